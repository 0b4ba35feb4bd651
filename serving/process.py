"""Starts a planned server, waits until it is healthy, stays with it, and ends it with everything below it."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import httpx

from serving.launch import ServerPlan
from serving.sockets import check_port_free, listens_below

logger = logging.getLogger(__name__)

REAPER = Path(__file__).with_name("reaper.py")
GRACE_SEC = 20.0  # from SIGTERM to SIGKILL
POLL_SEC = 0.2
PROGRESS_SEC = 15.0
SHOWN_LINES = 30
# What a log line starts with: (EngineCore pid=7) ERROR 11-21 22:10:00 [core.py:12]
_PREFIX = re.compile(r"^(\(.*?pid=\d+\) *)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d (\[\S+\] )?)?")
_CAUSE = re.compile(r"(\b\w*(Error|Exception)\b|\berror): *\S")
# Lines that only report that something else went wrong.
_WRAPPERS = ("see root cause", "see stack trace", "failed core proc", "initialization failed due to")


def failure_cause(lines: list[str], returncode: int | None) -> str:
    """One line that says why a server ended: its last own error, else its exit status."""
    for line in reversed(lines):
        if _CAUSE.search(line) and not any(wrapper in line.lower() for wrapper in _WRAPPERS):
            return _PREFIX.sub("", line.strip())
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
def _stop_signals(on_stop: Callable[[], None]) -> Iterator[None]:
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
    """A server's process as its owner sees it. Use as a context manager: leaving it ends the server."""

    def __init__(self, plan: ServerPlan, sink: IO[bytes], log_path: Path | None = None) -> None:
        self._plan, self._log_path = plan, log_path
        self.stopping = False
        # A session of its own: Ctrl-C in a terminal reaches us alone, and we pass it on. The reaper's standard
        # input is the lifeline that closes when we die.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(REAPER), str(GRACE_SEC), *plan.argv],
            env={**os.environ, **plan.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.log = LogPump(self._process.stdout, sink)
        self.log.start()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        self.wait(None)
        self.log.join(timeout=2.0)

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to end; ask again to kill it. Returns at once."""
        self.stopping = True
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it at once, with everything below it. Returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, timeout_sec: float | None) -> int | None:
        """Its exit status, or None when it still runs after ``timeout_sec``."""
        try:
            return self._process.wait(timeout_sec)
        except subprocess.TimeoutExpired:
            return None

    def wait_ready(self, timeout_sec: float) -> bool:
        """Wait for its health check; False when it was stopped meanwhile.

        Raises:
            ValueError: it ended, or wasn't ready in time; in one line, the cause included. The end of a log
                that goes to a file is written to standard error first.
        """
        start = last_progress = time.monotonic()
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while self.wait(POLL_SEC) is None:
                now = time.monotonic()
                if not self.stopping and _is_healthy(client, self._plan.url):
                    if listens_below(self._process.pid, self._plan.port):
                        return True
                    logger.debug("a stranger answers at %s", self._plan.url)
                if now - start > timeout_sec:
                    self.kill()
                    raise ValueError(self._failure(f"was not ready after {timeout_sec:.0f} s (startup_timeout_sec)"))
                if now - last_progress >= PROGRESS_SEC:
                    last_progress = now
                    sys.stderr.write(f"starting vLLM: {now - start:.0f} s\n")
        if self.stopping:
            return False
        raise ValueError(self._failure("did not start"))

    def _failure(self, what: str) -> str:
        lines = self.log.lines()
        message = f"vLLM {what}: {failure_cause(lines, self._process.poll())}"
        if self._log_path is None:  # the log is on the terminal, right above
            return message
        sys.stderr.write("".join(f"  {line}\n" for line in lines[-SHOWN_LINES:]))
        return f"{message} (whole log: {self._log_path})"


def _is_healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def run_server(
    plan: ServerPlan,
    startup_timeout_sec: float,
    on_ready: Callable[[], None],
    log_path: Path | None = None,
) -> int:
    """Start the server, call ``on_ready`` once it is healthy, and stay until it ends. Its log goes to standard
    error, or to ``log_path``. Ctrl-C and SIGTERM end it, within 20 s.

    Returns: 0 when it was asked to stop, 1 when it ended by itself (the reason is logged).

    Raises:
        ValueError: the port is in use, the log can't be written, or the server did not start.
    """
    check_port_free(plan.host, plan.port)
    try:
        sink = sys.stderr.buffer if log_path is None else log_path.open("wb")
    except OSError as error:
        raise ValueError(f"cannot write the log {log_path}: {error.strerror}") from error
    try:
        with RunningServer(plan, sink, log_path) as server, _stop_signals(server.stop):
            if not server.wait_ready(startup_timeout_sec):
                return 0
            on_ready()
            server.wait(None)
            if server.stopping:
                return 0
            logger.error("vLLM ended: %s", failure_cause(server.log.lines(), server.returncode))
            return 1
    finally:
        if log_path is not None:
            sink.close()
