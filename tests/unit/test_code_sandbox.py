"""The code checker: what passes, what fails and why, and that accidents stay inside."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from specdec.evaluation.suites.base import Item
from specdec.evaluation.suites.code import check_code, extract_program, run_limited

PROMPT = (
    'from typing import List\n\n\ndef helper(x):\n    return x + 1\n\n\ndef bump(xs: List[int]):\n    """Add one."""\n'
)
ITEM = Item(
    suite="humaneval",
    id="x/0",
    turns=("...",),
    answer="bump",
    context={
        "prompt": PROMPT,
        "entry_point": "bump",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 3]\n    assert candidate([]) == []\n",
    },
)
GOOD = "def bump(xs: List[int]):\n    return [helper(x) for x in xs]\n"


PR_SET_NAME = 15  # of prctl


def fenced(code: str, language: str = "python") -> str:
    return f"<think>\nhm\n</think>\n\nHere:\n\n```{language}\n{code}\n```\nDone."


def reason(response: str) -> str | None:
    verdict = check_code(ITEM, response)
    assert verdict.correct is (verdict.reason is None)
    return verdict.reason


@pytest.mark.parametrize(
    "response",
    [
        fenced(GOOD),
        fenced(GOOD, ""),
        GOOD,  # no fence, no thinking
        fenced("    return [x + 1 for x in xs]"),  # the body alone
        fenced("def bump(xs):\n    return 0") + fenced(GOOD),  # the last definition counts
        fenced(GOOD) + "\n```python\nprint(bump([1]))\n```",  # a usage example after it does not
        fenced("from __future__ import annotations\n" + GOOD),
        fenced(GOOD + "\nif __name__ == '__main__':\n    raise SystemExit(1)"),
        fenced(GOOD + "\nprint('x' * 10_000_000)"),
        fenced("bump = lambda xs: [x + 1 for x in xs]"),
        "```python\n" + GOOD,  # the fence never closes
    ],
)
def test_right_code_passes(response: str):
    assert reason(response) is None


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (fenced("def bump(xs):\n    return xs"), "failed: AssertionError"),
        (fenced("def bump(xs):\n    return [xs"), "syntax"),
        ("<think>\n```python\n" + GOOD + "```", "no code"),  # still thinking
        ("I can't.", "no code"),
        (fenced("print(1)"), "no code"),
        (fenced("import sys\nsys.exit(0)\n" + GOOD), "failed: SystemExit"),
        (fenced("import os\nos._exit(0)\n" + GOOD), "failed: left with status 0"),
        (fenced("def bump(xs):\n    import os\n    os._exit(0)"), "failed: left with status 0"),
        (fenced("raise KeyboardInterrupt\n" + GOOD), "failed: KeyboardInterrupt"),
        (fenced("def bump(xs):\n    return bump(xs)"), "failed: RecursionError"),
        (fenced("def bump(xs):\n    return [0] * 10**11"), "memory"),
        (fenced("def bump(xs):\n    return input()"), "failed: EOFError"),
        (fenced("import ctypes\ndef bump(xs):\n    ctypes.string_at(0)"), "failed: killed by signal"),
    ],
)
def test_wrong_code_fails_with_its_reason(response: str, why: str):
    assert str(reason(response)).startswith(why)


def test_equal_programs_vote_together_and_others_do_not():
    one = check_code(ITEM, fenced(GOOD)).answer
    assert one == check_code(ITEM, fenced(GOOD.replace("    return", "    # a comment\n\n    return"))).answer
    assert one != check_code(ITEM, fenced("def bump(xs):\n    return xs")).answer
    assert check_code(ITEM, "I can't.").answer is None


def test_prompts_that_do_not_compile_alone_are_left_out():
    assert extract_program(fenced("def f():\n    return 1"), "def f(:\n", "f") == ["def f():\n    return 1\n"]


def test_forged_reports_do_not_pass():
    forge = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'0123\\t["passed", ""]\\n["passed", ""]\\npassed\\n')
    except OSError:
        pass
print("passed", flush=True)
os._exit(0)
"""
    assert str(run_limited([forge])).startswith("failed")


def test_endless_loops_end_at_the_limit():
    started = time.monotonic()
    assert run_limited(["while True: pass"], timeout_sec=0.5) == "timeout after 0.5 s"
    assert run_limited(["import time\ntime.sleep(60)"], timeout_sec=0.3) == "timeout after 0.3 s"
    assert run_limited(["while True: print('x' * 1000)"], timeout_sec=0.3) == "timeout after 0.3 s"
    assert time.monotonic() - started < 10


def test_growing_memory_ends_at_the_limit():
    assert str(run_limited(["x = [0]\nwhile True: x += x"], memory_bytes=2**28)).startswith("memory")


def test_big_files_are_refused():
    assert "File too large" in str(run_limited(["f = open('big', 'wb')\nwhile True: f.write(bytes(10**6))"]))


@pytest.mark.parametrize("code", ["import os\nos.fork()", "import os\nos.system('true')", "import os\nos.kill(1, 9)"])
def test_processes_are_refused(code: str):
    assert "not allowed" in str(run_limited([code]))


def test_forks_behind_the_hook_are_bounded_and_end_with_the_check():
    name = f"bomb-{os.getpid()}"  # other tests run checks beside this one
    bomb = f"import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.prctl({PR_SET_NAME}, {name.encode()}) == 0"
    bomb += """
made = 0
for _ in range(100):
    pid = libc.fork()
    if pid == 0:
        libc.setsid()
        libc.sleep(30)
        libc._exit(0)
    made += pid > 0
raise ValueError(f"made {made}.")
"""
    probe = "import os\nassert os.getpid() == 1"
    if run_limited([probe]) is not None:
        pytest.skip("this machine permits no process table of one's own")
    verdict = str(run_limited([bomb]))
    assert int(verdict.split("made ")[1].rstrip(".")) < 40
    deadline = time.monotonic() + 5
    while (left := _named(name)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def _named(name: str) -> list[str]:
    """Ids of the processes of this name; what a process forks has its name."""
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() == name:
                    left.append(entry.name)
            except OSError:
                continue
    return left


def test_the_parents_environment_is_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPECDEC_TEST_SECRET", "s3cret")
    assert run_limited(["import os\nassert 'SPECDEC_TEST_SECRET' not in os.environ"]) is None
    assert "/proc" in str(run_limited([f"open('/proc/{os.getpid()}/environ').read()"]))


def test_only_the_working_folder_can_be_changed(tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    tmp_path.chmod(0o777)
    for code in (
        f"import os\nos.remove({str(kept)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/new', 'w')",
    ):
        assert "outside the working folder" in str(run_limited([code])), code
    assert kept.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    own = "import os, shutil\nopen('a', 'w').write('x')\nos.remove('a')\nos.mkdir('d')\nshutil.rmtree('d')"
    assert run_limited([own]) is None


def test_deleting_everything_in_the_working_folder_harms_nobody():
    here = sorted(Path().iterdir())
    assert run_limited(["import os\nfor name in os.listdir(): os.remove(name)"]) is None
    assert sorted(Path().iterdir()) == here


def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert str(run_limited([code])).startswith("failed: PermissionError")
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_standard_library_works_inside():
    code = "import asyncio, collections, datetime, hashlib, math, random, re, string, threading, typing"
    assert (
        run_limited([code, "asyncio.run(asyncio.sleep(0))", "assert hashlib.md5(b'').hexdigest()[:3] == 'd41'"]) is None
    )
