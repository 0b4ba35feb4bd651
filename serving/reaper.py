"""Runs one command so that nothing of it outlives its owner. Standard library only; runs as a file, isolated.

``python -I -S reaper.py GRACE_SEC COMMAND...`` stands between the owner and the server. It adopts every
process below it (a Linux child subreaper), so a process whose parent was killed is still found and ended:

* the command ends: what it left behind is killed, and its exit status is ours;
* SIGTERM or SIGINT: SIGTERM to the command, SIGKILL to everything after ``GRACE_SEC`` or at a second signal;
* the owner dies (``kill -9`` included): our standard input closes, and everything is killed at once;
* we die: the kernel sends the command SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINGER_SEC = 2.0  # how long processes may take to follow a command that ended by itself
LEFTOVER_SEC = 10.0  # how long killed processes may take to go (a process in a device call cannot die at once)
# Python's own helper: it removes shared memory that killed processes left, then ends by itself. Killed last.
TRACKER = b"multiprocessing.resource_tracker"


def descendants(root: int) -> list[int]:
    """Processes below ``root``, itself excluded."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:  # the name in parentheses may hold anything, so fields are read after the last one
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, unseen = [], [root]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _reap(command_pid: int) -> tuple[int | None, bool]:
    """Collect ended children: the command's exit status if it is among them, and whether any child is left."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status, False
        if pid == 0:
            return status, True
        if pid == command_pid:
            status = os.waitstatus_to_exitcode(wait_status)


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def _kill_everything(command_pid: int, linger_sec: float) -> int | None:
    """SIGKILL all descendants until none is left; the command's exit status if it ended here."""
    start = time.monotonic()
    status = None
    while (elapsed := time.monotonic() - start) < linger_sec + LEFTOVER_SEC:
        for pid in descendants(os.getpid()) if elapsed >= linger_sec else []:
            if elapsed < linger_sec + LINGER_SEC and _is_tracker(pid):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        ended, any_left = _reap(command_pid)
        status = ended if ended is not None else status
        if not any_left:
            break
        time.sleep(0.02)
    return status


def main(grace_sec: float, command: list[str]) -> int:
    """Run ``command`` to its end, or to ours; its exit status, 128 + n when signal n ended it."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    )

    status: int | None = None
    deadline: float | None = None
    while status is None:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select([sys.stdin, wake_read], [], [], timeout)
        if sys.stdin in readable or (deadline is not None and time.monotonic() >= deadline):
            break  # the owner is gone, or the grace is over
        received = os.read(wake_read, 512) if wake_read in readable else b""
        status, _ = _reap(child.pid)
        if status is None and any(number != signal.SIGCHLD for number in received):
            if deadline is not None:
                break
            deadline = time.monotonic() + grace_sec
            os.kill(child.pid, signal.SIGTERM)
    killed = _kill_everything(child.pid, LINGER_SEC if status is not None else 0.0)
    status = status if status is not None else killed
    if status is None:
        return 1
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
