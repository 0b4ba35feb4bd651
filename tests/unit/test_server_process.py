"""A server's process: ready, failed, stopped, orphaned. A small script stands in for vLLM."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from serving.process import failure_cause
from serving.sockets import free_port, listens_below

# A stand-in for vLLM: a server with a child that ignores SIGTERM and a grandchild that left the session.
FAKE = """
import http.server, os, signal, subprocess, sys, time
port, mode, pids = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stubborn = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
loner = f"import os, time; os.setsid(); open({pids!r}, 'a').write(f'{os.getpid()}\\\\n'); time.sleep(300)"
child = stubborn + f"subprocess.Popen([sys.executable, '-c', {loner!r}]); "
child += f"import os; open({pids!r}, 'a').write(f'{{os.getpid()}}\\\\n'); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", child])
open(pids, "a").write(f"{os.getpid()}\\n")
while len(open(pids).read().split()) < 3:
    time.sleep(0.01)
print("hello on stdout", flush=True)
print("of", os.environ.get("TAKEN"), os.environ.get("KEPT"), os.environ.get("ADDED"), flush=True)
if mode == "fail":
    print("ValueError: no such head", file=sys.stderr)
    sys.exit(1)
if mode == "hang":
    time.sleep(300)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else lambda *_: os._exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/die":
            print("RuntimeError: engine died", flush=True)
            os._exit(3)
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DRIVER = """
import json, pathlib, sys
from serving import process, serve
from serving.launch import ServerPlan
from serving.supervisor import supervise
from specdec.config import ServeConfig
process.GRACE_SEC = 1.0
plan = ServerPlan(**json.loads(sys.argv[1]))
log = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
try:
    settings = ServeConfig(startup_timeout_sec=float(sys.argv[2]), max_restarts=0, drain_sec=0)
    sys.exit(supervise(plan, None, settings, serve.announce, None, log))
except ValueError as error:
    sys.exit(f"error: {error}")
"""


class Fake:
    """A driver that serves the stand-in, as a process of its own."""

    def __init__(self, folder: Path, mode: str, *, timeout_sec: float = 30.0, log: Path | None = None) -> None:
        script = folder / "fake.py"
        script.write_text(FAKE)
        self.pids_path = folder / "pids"
        port = free_port("127.0.0.1")
        planned = {
            "argv": [sys.executable, str(script), str(port), mode, str(self.pids_path)],
            "env": {"TAKEN": "", "ADDED": "more"}, "url": f"http://127.0.0.1:{port}", "host": "127.0.0.1",
            "port": port, "served_model_name": "m", "target": "t", "head": None, "num_speculative_tokens": 0,
            "dtype": "float32",
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, json.dumps(planned), str(timeout_sec), *([str(log)] if log else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def await_started(self) -> None:
        while not self.pids_path.exists() or len(self.pids_path.read_text().split()) < 3:
            assert self.process.poll() is None, self.end()
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    @contextmanager
    def owned(self) -> Iterator[Fake]:
        yield self
        self.process.terminate()
        self.end()
        self.assert_nothing_left()

    def assert_nothing_left(self) -> None:
        pids = [int(pid) for pid in self.pids_path.read_text().split()]
        assert len(pids) == 3
        deadline = time.monotonic() + 10
        while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.05)


def test_one_ready_line_then_sigterm_ends_even_stubborn_processes(tmp_path: Path):
    fake = Fake(tmp_path, "serve")
    facts = fake.ready()
    assert facts["ready"] is True
    assert (facts["pid"], facts["model"], facts["head"]) == (fake.process.pid, "m", None)
    fake.process.send_signal(signal.SIGTERM)
    code, out, err = fake.end()
    assert (code, out) == (0, "")
    assert "hello on stdout" in err  # the server's own output never mixes with ours
    assert f"ready: {facts['url']} model=m head=None K=0 dtype=float32" in err
    assert "Traceback" not in err
    fake.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path, number):
    fake = Fake(tmp_path, "deaf")
    fake.ready()
    fake.process.send_signal(number)
    assert fake.end()[0] == 0
    fake.assert_nothing_left()


def test_kill_9_of_the_owner_leaves_no_orphan(tmp_path: Path):
    fake = Fake(tmp_path, "deaf")
    fake.ready()
    os.kill(fake.process.pid, signal.SIGKILL)
    fake.assert_nothing_left()


def test_kill_9_of_the_reaper_leaves_no_orphan_either(tmp_path: Path):
    """Whoever holds the port would keep the next server from starting."""
    fake = Fake(tmp_path, "deaf")
    fake.ready()
    [reaper] = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and is_reaper_of(entry, fake.process.pid)
    ]
    os.kill(reaper, signal.SIGKILL)
    assert fake.end()[0] == 1
    fake.assert_nothing_left()


def is_reaper_of(process: Path, owner: int) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == owner and "reaper.py" in (process / "cmdline").read_text()
    except OSError:
        return False


def test_a_failed_start_says_why_and_keeps_the_log(tmp_path: Path):
    fake = Fake(tmp_path, "fail", log=tmp_path / "server.log")
    code, out, err = fake.end()
    assert (code, out) == (1, "")
    log = tmp_path / "server.log"
    assert "\n  ValueError: no such head\n" in err  # the end of the log
    assert err.endswith(f"error: vLLM did not start: ValueError: no such head (whole log: {log})\n")
    assert "hello on stdout" in log.read_text()
    fake.assert_nothing_left()


def test_the_plan_adds_to_the_environment_and_takes_from_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TAKEN", "4")
    monkeypatch.setenv("KEPT", "mine")
    fake = Fake(tmp_path, "fail")
    _, _, err = fake.end()
    assert "of None mine more" in err
    fake.assert_nothing_left()


def test_a_start_that_hangs_is_given_up(tmp_path: Path):
    fake = Fake(tmp_path, "hang", timeout_sec=6.0)
    fake.await_started()
    code, _, err = fake.end()
    assert code == 1
    assert "was not ready after 6 s" in err
    fake.assert_nothing_left()


def test_an_engine_that_dies_later_ends_with_1_and_its_reason(tmp_path: Path):
    fake = Fake(tmp_path, "serve")
    url = fake.ready()["url"]
    with suppress(httpx.HTTPError):
        httpx.get(f"{url}/die", trust_env=False)
    code, _, err = fake.end()
    assert code == 1
    assert "vLLM ended: RuntimeError: engine died" in err
    assert "giving up" in err
    fake.assert_nothing_left()


def test_a_server_is_told_from_a_stranger_on_the_same_port(tmp_path: Path):
    with Fake(tmp_path, "serve").owned() as fake:
        port = int(fake.ready()["url"].rpartition(":")[2])
        assert listens_below(fake.process.pid, port)
        assert not listens_below(fake.process.pid, free_port("127.0.0.1"))
        with socket.socket() as ours:
            ours.bind(("127.0.0.1", 0))
            ours.listen()
            assert not listens_below(fake.process.pid, ours.getsockname()[1])


def test_the_cause_is_the_innermost_error_not_its_wrappers():
    lines = [
        "(EngineCore pid=7) ERROR 11-21 22:10:00 [core.py:12] ValueError: head is too small",
        "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s)",
        "some last words",
    ]
    assert failure_cause(lines, 1) == "ValueError: head is too small"
    assert failure_cause(["api_server.py: error: unrecognized arguments: --x"], 2).endswith("arguments: --x")
    prefix = "(EngineCore pid=7) ERROR 11-21 22:10:00 [core.py:12]"
    silent = [
        f"{prefix} Worker proc VllmWorker-0 died unexpectedly (exit code: -9)",
        f"{prefix} RuntimeError: Executor failed.",
        f"{prefix} engine core exited unexpectedly; starting cleanup",
        "EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
    ]
    assert failure_cause(silent, 0) == "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
    assert failure_cause(["INFO all is well"], None) == "still running"
    assert failure_cause([], 137) == "killed by signal 9 (out of memory?)"
