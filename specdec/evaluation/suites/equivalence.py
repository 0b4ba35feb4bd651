"""Symbolic comparison in a process of its own, because sympy may take for ever and nothing inside it can say stop.

math-verify's own time limits are signals, which work in the main thread alone and don't interrupt big integers.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

TIMEOUT_SEC = 10.0
START_TIMEOUT_SEC = 120.0  # importing sympy on a busy machine
MAX_CHARS = 400
CHILD = Path(__file__).with_name("equivalence_child.py")


class SymbolicComparer:
    """A worker process that is started when first asked and replaced after a time-out. Safe to share by threads."""

    def __init__(self, timeout_sec: float = TIMEOUT_SEC) -> None:
        self.timeout_sec = timeout_sec
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def compare(self, gold: str | None, answer: str) -> tuple[bool, str | None]:
        """Whether ``answer`` equals ``gold``, and a spelling that equal answers mostly share.

        (False, None) for what is too long, takes too long or can't be parsed.

        Raises:
            ValueError: the worker does not start, which means that math-verify is missing.
        """
        if len(answer) > MAX_CHARS or (gold is not None and len(gold) > MAX_CHARS):
            return False, None
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                process.stdin.flush()
                line = self._read_line(process, self.timeout_sec)
            except BrokenPipeError:
                line = None
            if line is None:
                self._stop()
                return False, None
            equal, spelled = json.loads(line)
            return equal, spelled

    def close(self) -> None:
        """End the worker; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(CHILD)]  # -P: the files beside it must not pass for the library's
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process, self._received = process, b""
        if self._read_line(process, START_TIMEOUT_SEC) != b"ready":
            self._stop()
            raise ValueError("math-verify does not load; install it with: pip install math-verify")
        return process

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        with self._process:  # closes the pipes and reaps
            self._process = None

    def _read_line(self, process: subprocess.Popen[bytes], timeout_sec: float) -> bytes | None:
        assert process.stdout is not None
        deadline = time.monotonic() + timeout_sec
        while b"\n" not in self._received:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([process.stdout], [], [], remaining)[0]:
                return None
            chunk = os.read(process.stdout.fileno(), 65_536)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line


COMPARER = SymbolicComparer()


@lru_cache(maxsize=8192)
def compare(gold: str | None, answer: str) -> tuple[bool, str | None]:
    """``SymbolicComparer.compare`` of the process's one worker, remembered."""
    return COMPARER.compare(gold, answer)
