"""The two arms of a comparison: a plain server and a speculative one, started here or given as URLs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.config import RunConfig, dump_yaml
from specdec.device import detect_device, staggered_binding

PLAIN = "plain"
SPEC = "spec"
STOP_GRACE_SEC = 30.0
LOG_LINES_SHOWN = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One server under test. ``url`` is its root, without ``/v1``."""

    name: str
    url: str
    model: str
    num_speculative_tokens: int | None = None  # what the server said at its start; None: unknown
    dtype: str | None = None  # likewise


def given_arms(plain_url: str, spec_url: str) -> dict[str, Arm]:
    """Arms at two servers that already run.

    Raises:
        ValueError: a server does not answer, or serves no model.
    """
    return {name: _given_arm(name, url) for name, url in ((PLAIN, plain_url), (SPEC, spec_url))}


def _given_arm(name: str, url: str) -> Arm:
    import httpx

    root = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/v1/models", timeout=30, trust_env=False)
        answer.raise_for_status()
        model = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"the {name} server at {url} does not answer ({error}); is it running?") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the {name} server at {url} lists no model at /v1/models: not an OpenAI server") from error
    return Arm(name=name, url=root, model=model)


@contextlib.contextmanager
def started_arms(config: RunConfig, target_name: str, head_dir: Path, out_dir: Path) -> Iterator[dict[str, Arm]]:
    """Serve ``target_name`` plain and with the head in ``head_dir``, until the block ends.

    Both start at the same time: a start is mostly single-threaded compilation. Each process logs to
    ``out_dir/<arm>-server.log``; on leaving the block (also by Ctrl-C) both get SIGTERM.

    Raises:
        ValueError: a server ends before it is ready (its last log lines are in the message) or is not
            ready within ``config.serve.startup_timeout_sec``.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    config_path = out_dir / "config.yaml"
    config_path.write_text(dump_yaml(config))
    decoding = {PLAIN: ["--no-speculation"], SPEC: ["--head", str(head_dir)]}
    servers: list[_Server] = []
    try:
        ports = free_ports(len(decoding))
        for turn, (name, options) in enumerate(decoding.items()):
            command = [sys.executable, "-m", "specdec", "serve", "--target", target_name, *options]
            command += ["--port", str(ports[turn]), "--config", str(config_path), *_binding(config, turn)]
            servers.append(_Server(name, command, out_dir / f"{name}-server.log"))
        deadline = time.monotonic() + config.serve.startup_timeout_sec
        yield {server.name: arm for server, arm in zip(servers, _await_ready(servers, deadline), strict=True)}
    finally:
        _stop(servers)


def _binding(config: RunConfig, turn: int) -> list[str]:
    device = detect_device()
    if device.kind != "cpu" or config.serve.threads_bind != "auto" or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return []
    return ["--set", f"serve.threads_bind={staggered_binding(device, turn)}"]


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports that are free on the loopback interface at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class _Server:
    """A ``specdec serve`` process: stderr goes to its log, stdout is read for the ready message."""

    def __init__(self, name: str, command: list[str], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self.ready: dict[str, Any] | None = None
        with log_path.open("wb") as log:
            # Its own session: Ctrl-C in the terminal must reach the measurement, not the servers under it.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
                text=True,
                errors="replace",
            )
        threading.Thread(target=self._read_stdout, name=f"{name}-stdout", daemon=True).start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # to its end, so that a chatty server never blocks on a full pipe
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(line)
                if isinstance(message, dict) and message.get("ready"):
                    self.ready = message

    def last_log_lines(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-LOG_LINES_SHOWN:]) or "  (nothing)"


def _die_with_parent():
    """Linux: ask for SIGTERM when this process dies, however it dies; None where that does not exist."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    pr_set_pdeathsig = 1
    return lambda: prctl(pr_set_pdeathsig, int(signal.SIGTERM))


def _await_ready(servers: list[_Server], deadline: float) -> list[Arm]:
    while any(server.ready is None for server in servers):
        for server in servers:
            status = server.process.poll()
            if status is not None:
                raise ValueError(
                    f"the {server.name} server ended with status {status} before it was ready. "
                    f"The end of {server.log_path}:\n{server.last_log_lines()}"
                )
        if time.monotonic() > deadline:
            late = next(server for server in servers if server.ready is None)
            raise ValueError(
                f"the {late.name} server was not ready in time; raise serve.startup_timeout_sec. "
                f"The end of {late.log_path}:\n{late.last_log_lines()}"
            )
        time.sleep(0.1)
    return [_ready_arm(server) for server in servers]


def _ready_arm(server: _Server) -> Arm:
    assert server.ready is not None
    num_speculative_tokens = server.ready.get("num_speculative_tokens")
    if server.name == SPEC and not num_speculative_tokens:
        raise ValueError(
            "the spec server came up without speculation, so there is nothing to compare. "
            f"The end of {server.log_path}:\n{server.last_log_lines()}"
        )
    return Arm(
        name=server.name,
        url=server.ready["url"].rstrip("/").removesuffix("/v1"),
        model=server.ready["model"],
        num_speculative_tokens=num_speculative_tokens or 0,
        dtype=server.ready.get("dtype"),
    )


def _stop(servers: list[_Server]) -> None:
    for server in servers:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_GRACE_SEC
    for server in servers:
        try:
            server.process.wait(max(0.1, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: no more grace
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
