"""The arms of a comparison: servers, started here as ``specdec serve`` processes or given as URLs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.config import RunConfig, dump_yaml
from specdec.device import detect_device
from specdec.evaluation.arm_specs import ArmSpec, serve_arguments

STOP_GRACE_SEC = 30.0
LOG_LINES_SHOWN = 15


@dataclass(kw_only=True, slots=True)
class Arm:
    """One server under test. ``url`` is its root, without ``/v1``."""

    name: str
    url: str
    model: str
    num_speculative_tokens: int | None = None  # K at its largest, 0 for plain decode; None: not known yet
    dtype: str | None = None  # as the server said at its start
    options: dict[str, str] = field(default_factory=dict)
    xargs: dict[str, str] = field(default_factory=dict)  # sent with each request
    synthetic: bool = False  # acceptance is pretended: its timings are a cost surface

    def asked_width(self, served: int) -> int:
        """K of a server that drafts ``served`` tokens at most, as far as each request asks for less."""
        asked = self.xargs.get("specdec", "")
        return 0 if asked == "off" else min(int(asked), served) if asked.isdecimal() else served


@contextlib.contextmanager
def open_arms(specs: list[ArmSpec], config: RunConfig, out_dir: Path) -> Iterator[dict[str, Arm]]:
    """Every arm by name, in order: servers that run are asked what they serve, the others run until the block ends.

    They start together, on a CPU as many as it has cores at a time. Each process logs to
    ``out_dir/<arm>-server.log``; on leaving the block (also by Ctrl-C) they get SIGTERM.

    Raises:
        ValueError: a given server does not answer, or one ends before it is ready (its last log lines are in the
            message) or is not ready within ``config.serve.startup_timeout_sec``.
    """
    given = {spec.name: _given_arm(spec, spec.url) for spec in specs if spec.url is not None}
    to_start = [spec for spec in specs if spec.url is None]
    servers: list[_Server] = []
    try:
        started = _start(to_start, config, out_dir, servers) if to_start else {}
        yield {spec.name: {**given, **started}[spec.name] for spec in specs}
    finally:
        _stop(servers)


def auth_headers() -> dict[str, str]:
    """For servers that want a key: the one that ``specdec serve`` takes, else the one that ``specdec chat`` sends."""
    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _given_arm(spec: ArmSpec, url: str) -> Arm:
    import httpx

    name = spec.name

    root = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/v1/models", timeout=30, trust_env=False, headers=auth_headers())
        answer.raise_for_status()
        model = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(
            f"the {name} server at {url} does not answer ({error}); is it running, and VLLM_API_KEY its key if any?"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the {name} server at {url} lists no model at /v1/models: not an OpenAI server") from error
    return Arm(name=name, url=root, model=model, options=spec.options, xargs=spec.xargs)


def _start(specs: list[ArmSpec], config: RunConfig, out_dir: Path, servers: list[_Server]) -> dict[str, Arm]:
    device = detect_device()
    out_dir.mkdir(parents=True, exist_ok=True)
    config_path = out_dir / "config.yaml"
    config_path.write_text(dump_yaml(config))
    arguments = [serve_arguments(spec) for spec in specs]  # a bad head is refused before anything starts
    # On a CPU a start keeps one core busy; and what the first servers compile, the next ones find in the cache.
    at_once = max(2, len(device.core_ids)) if device.kind == "cpu" else len(specs)
    for turn, spec in enumerate(specs):
        if turn and turn % at_once == 0:
            _await_ready(servers, time.monotonic() + config.serve.startup_timeout_sec)
        command = [sys.executable, "-m", "specdec", "serve", "--target", spec.target(config.target.name)]
        command += ["--config", str(config_path), "--set", "serve.port=0", *arguments[turn]]
        servers.append(_Server(spec, command, out_dir / f"{spec.name}-server.log"))
    arms = _await_ready(servers, time.monotonic() + config.serve.startup_timeout_sec)
    return {arm.name: arm for arm in arms}


class _Server:
    """A ``specdec serve`` process: stderr goes to its log, stdout is read for the ready message."""

    def __init__(self, spec: ArmSpec, command: list[str], log_path: Path) -> None:
        self.spec, self.name = spec, spec.name
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
        threading.Thread(target=self._read_stdout, name=f"{self.name}-stdout", daemon=True).start()

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
    num_speculative_tokens = server.ready.get("num_speculative_tokens") or 0
    if not num_speculative_tokens and {"head", "method"} & set(server.spec.options):
        raise ValueError(
            f"the {server.name} server came up without speculation, so it would be measured as what it is not. "
            f"The end of {server.log_path}:\n{server.last_log_lines()}"
        )
    return Arm(
        name=server.name,
        url=server.ready["url"].rstrip("/").removesuffix("/v1"),
        model=server.ready["model"],
        num_speculative_tokens=num_speculative_tokens,
        dtype=server.ready.get("dtype"),
        options=server.spec.options,
        xargs=server.spec.xargs,
        synthetic=server.spec.is_synthetic,
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
