"""``python tests/ranks.py JOBS``: runs of ``specdec train`` in several processes, forked behind the slow imports.

JOBS is JSON: a list of ``{"name", "arguments", "num_processes", "at"}``; ``at`` is null or ``[rank, step, event]``:
what befalls one process before it computes that step, the name of a signal, or ``disk full`` from then on.
Prints, by name, each process's ``{"code", "stdout", "stderr"}``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import draft_training.trainer
from draft_training.step import GradientMaker
from draft_training.target_model import TargetModel
from specdec.cli import main

PATIENCE_SEC = 60.0


def strike(step: int, event: str) -> None:
    """Let ``event`` befall this process before it computes ``step``."""
    compute, calls = GradientMaker.run, 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and event != "disk full":
            os.kill(os.getpid(), signal.Signals[event])
        elif calls == step:
            draft_training.trainer.save_checkpoint = no_space
        return compute(*args, **kwargs)

    GradientMaker.run = run  # type: ignore[method-assign]


def no_space(*_args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt")


def child(job: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """One process of ``job``; never returns."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["num_processes"]),
        "LOCAL_WORLD_SIZE": str(job["num_processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    if job["at"] and job["at"][0] == rank:
        strike(*job["at"][1:])
    sys.argv = ["specdec", "train", *job["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork, wait, and read what was said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pids = []
        for rank in range(job["num_processes"]):
            pids.append(os.fork())
            if not pids[-1]:
                child(job, rank, port, folder)
        codes: dict[int, int] = {}
        deadline = time.monotonic() + PATIENCE_SEC
        while len(codes) < len(pids):
            if time.monotonic() > deadline:
                for pid in set(pids) - set(codes):
                    os.kill(pid, signal.SIGKILL)
            for pid in set(pids) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return [
            {"code": codes[pid], **{name: (folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr")}}
            for rank, pid in enumerate(pids)
        ]


if __name__ == "__main__":
    assert TargetModel
    torch.set_num_threads(1)
    print(json.dumps({job["name"]: run(job) for job in json.loads(sys.argv[1])}))  # noqa: T201
