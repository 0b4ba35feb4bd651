"""Checks Python code: the model's program and the benchmark's tests, in a process of their own under limits.

The limits are against accidents: endless loops, runaway memory, forks, an early exit, stray deletions, the network.
They are no jail. Code that sets out to harm finds a way around an audit hook and user rights; run the evaluation of
models you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from specdec.evaluation.suites.base import Item, Verdict, answer_text
from specdec.record import text_sha256

TIMEOUT_SEC = 10.0
MEMORY_BYTES = 2**30
MAX_CODE_CHARS = 100_000
MAX_REPORT_BYTES = 65_536
CHILD = Path(__file__).with_name("sandbox_child.py")
FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def check_code(item: Item, response: str) -> Verdict:
    """Judge a completed function: ``item.context`` holds prompt, entry_point and test.

    ``Verdict.reason`` starts with "no code", "syntax", "timeout", "memory" or "failed"; ``answer`` is a fingerprint
    of the program, the same for programs that differ in layout and comments alone.
    """
    entry_point = item.context["entry_point"]
    text = answer_text(response)
    program = None if text is None else extract_program(text, item.context["prompt"], entry_point)
    if program is None:
        return Verdict(correct=False, answer=None, reason="no code" if text is not None else "no code: still thinking")
    reason = run_limited([*program, item.context["test"], f"check({entry_point})"])
    return Verdict(correct=reason is None, answer=_fingerprint(program[-1]), reason=reason)


def extract_program(text: str, prompt: str, entry_point: str) -> list[str] | None:
    """The parts to run before the tests: the prompt's imports and helpers, then the model's code.

    The last block that defines ``entry_point`` counts. Without one, an indented block is taken for the function's
    body; without any fence, the text from the definition on.
    """
    defines = re.compile(rf"^[ \t]*(?:async\s+)?def\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*=", re.M)
    blocks = [
        match.group(2) for match in FENCE.finditer(text) if match.group(1).lower() in ("", "py", "python", "python3")
    ]
    if not blocks and (found := defines.search(text)):
        blocks = [text[found.start() :]]
    for block in reversed(blocks):
        if defines.search(block):
            return [part for part in (prompt,) if _compiles(part)] + [block[:MAX_CODE_CHARS]]
    for block in reversed(blocks):
        if block[:1] in (" ", "\t"):
            return [(prompt + block)[:MAX_CODE_CHARS]]
    return None


def run_limited(parts: Sequence[str], timeout_sec: float = TIMEOUT_SEC, memory_bytes: int = MEMORY_BYTES) -> str | None:
    """Run ``parts`` one after the other in one namespace of a limited process. None when the last one came through.

    Returns:
        Otherwise the reason: "syntax: ...", "timeout after ... s", "memory: ..." or "failed: ...".
    """
    token = secrets.token_hex(16)
    job = {"token": token, "parts": list(parts), "cpu_sec": math.ceil(timeout_sec) + 1, "memory_bytes": memory_bytes}
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="specdec-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
            cwd=folder,
            env={},
            start_new_session=True,
        )
        os.close(writer)
        try:
            assert process.stdin is not None
            deadline = time.monotonic() + timeout_sec
            try:
                with process.stdin as stdin:
                    stdin.write(json.dumps(job).encode())
            except BrokenPipeError:
                pass  # it died at once; the report says so by its absence
            return _outcome(reader, token, deadline, timeout_sec)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
            process.wait()
            os.close(reader)


def _outcome(reader: int, token: str, deadline: float, timeout_sec: float) -> str | None:
    """Wait for the line that starts with ``token``; anything else on the pipe is not the harness speaking."""
    received = b""
    report = re.compile(rb"(?:^|\n)" + token.encode() + rb"\t([^\n]*)\n")
    while (found := report.search(received)) is None:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([reader], [], [], remaining)[0]:
            return f"timeout after {timeout_sec:g} s"
        chunk = os.read(reader, 4096)
        received += chunk
        if not chunk or len(received) > MAX_REPORT_BYTES:
            return "failed: ended without a result"
    outcome, detail = json.loads(found.group(1))
    if outcome == "passed":
        return None
    return f"{outcome}: {detail}" if detail else outcome


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _fingerprint(source: str) -> str:
    try:
        source = ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        source = source.strip()
    return f"code {text_sha256(source)[:16]}"
