"""One server process: starts it, asks whether it is healthy, says why it failed, ends it with everything below it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

import httpx

from serving.launch import ServerPlan
from serving.sockets import listens_below

REAPER = Path(__file__).with_name("reaper.py")
GRACE_SEC = 20.0  # from the last answer after SIGTERM to SIGKILL
PROBE_SEC = 5.0  # how long a health check may take
SHOWN_LINES = 30
MAX_CAUSE_CHARS = 500  # some errors print a whole configuration
# What a log line starts with: (EngineCore pid=7) ERROR 11-21 22:10:00 [core.py:12]
_PREFIX = re.compile(r"^(\(.*?pid=\d+\) *)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[\S+\] )?)?")
_CAUSE = re.compile(r"(\b\w*(Error|Exception)\b|\berror): *\S")
# Lines that only report that something else went wrong.
_WRAPPERS = ("see root cause", "see stack trace", "failed core proc", "initialization failed due to", "executor failed")
_SILENT_END = "unexpectedly"  # what is left to say of an engine that was killed without a word


def failure_cause(lines: list[str], returncode: int | None) -> str:
    """One line that says why a server ended: its last own error, else its exit status. ``returncode`` is None when
    it still ran."""
    for line in reversed(lines):
        if _CAUSE.search(line) and not any(wrapper in line.lower() for wrapper in _WRAPPERS):
            return _PREFIX.sub("", line.strip())[:MAX_CAUSE_CHARS]
    for line in lines:  # the first: the rest follows from it
        if _SILENT_END in line:
            return _PREFIX.sub("", line.strip())[:MAX_CAUSE_CHARS]
    if returncode is None:
        return "still running"
    if returncode in (128 + signal.SIGKILL, -signal.SIGKILL):
        return "killed by signal 9 (out of memory?)"
    return f"exit status {returncode}"


class LogPump(threading.Thread):
    """Copies the server's output to ``sink`` and keeps its last lines."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        super().__init__(name="server-log", daemon=True)
        self._source, self._sink = source, sink
        self._lines: deque[str] = deque(maxlen=400)  # an engine's traceback is longer than what is shown

    def run(self) -> None:
        """Until the output ends."""
        for line in self._source:
            self._lines.append(line.decode(errors="replace").rstrip())
            try:
                self._sink.write(line)
                self._sink.flush()
            except (OSError, ValueError):
                continue  # nobody reads our log any more; the server must not block on it

    def lines(self) -> list[str]:
        """The last lines so far; complete once the server has ended."""
        self.join(timeout=1.0 if self.is_alive() else 0)
        return [line for line in self._lines.copy() if line]


@contextmanager
def stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """While open, Ctrl-C, SIGTERM and SIGHUP call ``on_stop`` instead of raising."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        on_stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RunningServer:
    """A server's process as its owner sees it."""

    def __init__(self, plan: ServerPlan, sink: IO[bytes], drain_sec: float, log_path: Path | None = None) -> None:
        """Start it. Its output goes to ``sink``, which writes ``log_path`` when there is one; requests in flight have
        ``drain_sec`` to end after ``stop``."""
        self._plan, self._log_path = plan, log_path
        self._is_ours = False
        self._client = httpx.Client(
            trust_env=False, timeout=PROBE_SEC, limits=httpx.Limits(max_keepalive_connections=0)
        )
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we pass it on. The reaper's standard
        # input is the lifeline that closes when we die.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(REAPER), str(drain_sec + GRACE_SEC), *plan.argv],
            env={name: value for name, value in {**os.environ, **plan.env}.items() if plan.env.get(name) != ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.log = LogPump(self._process.stdout, sink)
        self.log.start()

    @property
    def returncode(self) -> int | None:
        """None while it, or anything below it, runs."""
        return self._process.poll()

    def is_healthy(self) -> bool:
        """Whether it, and no stranger on its port, answers the health check, and once it did, its engine too; takes up
        to twice ``PROBE_SEC``."""
        if self._asked("/health") != 200:
            return False
        if self._is_ours:
            return self._asked("/specdec/live") not in (503, None)
        self._is_ours = listens_below(self._process.pid, self._plan.port)
        return self._is_ours

    def _asked(self, path: str) -> int | None:
        """The status of an answer; None without one."""
        try:
            return self._client.get(f"{self._plan.url}{path}").status_code
        except httpx.HTTPError:
            return None

    def stop(self) -> None:
        """Ask it to finish what it is at and end; ask again to kill it. Returns at once."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self) -> None:
        """Kill it, with everything below it, and wait until it is gone. May be called again."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() == -signal.SIGKILL:  # the reaper was killed, and what it watched holds the port
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.log.join(timeout=2.0)
        self._client.close()

    def failure(self, what: str) -> str:
        """One line: ``what`` happened to vLLM and why. The end of a log that goes to a file is written to standard
        error first."""
        lines = self.log.lines()
        message = f"vLLM {what}: {failure_cause(lines, self._process.poll())}"
        if self._log_path is None:  # the log is on the terminal, right above
            return message
        with suppress(OSError):
            sys.stderr.write("".join(f"  {line}\n" for line in lines[-SHOWN_LINES:]))
        return f"{message} (whole log: {self._log_path})"
