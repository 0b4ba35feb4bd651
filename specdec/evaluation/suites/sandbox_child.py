"""The far side of the code checker: a script, run by ``code.py`` as ``python -I -S -B sandbox_child.py FD``.

It reads a JSON job on standard input, forks a worker under limits that runs the job's parts in one namespace, and
writes one line to FD: a token that only the job names, a tab, and a JSON [outcome, detail]. Only the standard
library is within reach here.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000  # <linux/sched.h>
MAX_FILE_BYTES = 16 * 2**20
MAX_OPEN_FILES = 64
MAX_PROCESSES = 32  # threads count too

STARTS_PROCESS = frozenset(
    (
        *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system"),
        *("os.kill", "os.killpg", "pty.spawn", "subprocess.Popen"),
    )
)
CHANGES_FILES = frozenset(
    (
        *("os.chmod", "os.chown", "os.link", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"),
        "shutil.rmtree",
    )
)
HARMLESS_SOCKET = frozenset(("socket.__new__", "socket.gethostname"))  # asyncio opens a pair of its own
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_root() -> None:
    """Process limits do not bind root. Stay able to read the standard library, which may be in root's home."""
    if os.getuid() != 0 or not hasattr(os, "setresuid"):
        return
    try:
        os.setgroups([])
        os.seteuid(NOBODY)
        readable = os.access(os.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        effective = NOBODY if readable else 0
        os.chown(".", effective, effective)
        os.setresuid(NOBODY, effective, effective)  # the limit counts by the real id, files go by the effective one
    except OSError:
        return  # a container without that right: the other limits hold


def leave_namespaces() -> None:
    """No network, and a process table of its own, whose end takes every descendant along. Where it is permitted."""
    try:
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID)
    except (AttributeError, OSError, TypeError):
        return  # not Linux


def set_limits(cpu_sec: int, memory_bytes: int) -> None:
    """Hard limits of this process and of what it starts."""
    wanted = {
        "RLIMIT_CPU": cpu_sec,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_NPROC": MAX_PROCESSES,
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        try:
            limit = getattr(resource, name)
            _, hard = resource.getrlimit(limit)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (value, value))
        except (AttributeError, OSError, ValueError):
            continue  # this system has no such limit


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses the network, new processes, a look at others, and changes outside ``folder``."""

    def refuse_outside(path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        where = os.path.realpath(os.fsdecode(path))
        if where not in (folder, os.devnull) and not where.startswith(folder + os.sep):
            raise PermissionError(f"{where} is outside the working folder")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS_PROCESS or (event.startswith("socket.") and event not in HARMLESS_SOCKET):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            if isinstance(args[2], int) and args[2] & WRITING:
                refuse_outside(args[0])
            if isinstance(args[0], str | bytes) and os.fsdecode(args[0]).startswith("/proc"):
                raise PermissionError("/proc is not open here")  # environments of other processes lie there
        elif event in CHANGES_FILES:
            refuse_outside(args[0])
            if event in ("os.rename", "os.link"):
                refuse_outside(args[1])

    return hook


def run_parts(parts: list[str]) -> tuple[str, str]:
    """Execute the parts one after the other in one namespace. Returns (outcome, detail)."""
    try:
        codes = [compile(part, f"<part {number}>", "exec") for number, part in enumerate(parts)]
        namespace: dict[str, Any] = {"__name__": "candidate"}  # so that a main guard stays shut
        sys.addaudithook(guard(os.path.realpath(".")))
    except (SyntaxError, ValueError) as error:
        return "syntax", str(error)[:200]
    try:
        for code in codes:
            exec(code, namespace)
    except MemoryError:
        return "memory", ""
    except BaseException as error:  # SystemExit too: whoever leaves before the end has not passed
        try:
            return "failed", f"{type(error).__name__}: {error}"[:200]
        except BaseException:
            return "failed", "an exception that cannot be shown"
    return "passed", ""


def main() -> None:
    """Read the job, run it in a worker, report."""
    channel = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    leave_root()
    leave_namespaces()

    def report(outcome: str, detail: str) -> None:
        os.write(channel, f"{job['token']}\t{json.dumps([outcome, detail])}\n".encode())

    worker = os.fork()
    if worker == 0:
        set_limits(job["cpu_sec"], job["memory_bytes"])
        report(*run_parts(job["parts"]))
        os._exit(0)
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    report("failed", f"killed by signal {-code}" if code < 0 else f"left with status {code} before the tests were done")


if __name__ == "__main__":
    main()
