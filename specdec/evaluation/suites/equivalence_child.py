"""The far side of ``equivalence.py``: a script that compares expressions with math-verify, one JSON line at a time.

It answers [gold or null, answer] with [whether they are equal, a spelling of the answer or null].
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 2 * 2**30
# LaTeX alone: the extraction of bare expressions would hand the model's text to sympy's parse_expr, which is an eval.
CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer, without its own time limit: the other side keeps one."""
    return list(parse(f"\\boxed{{{answer}}}", CONFIG, fallback_mode="no_fallback", parsing_timeout=None))


def spelling(expression: Any) -> str | None:
    """The evaluated expression as text; None where that says nothing."""
    if isinstance(expression, str):
        return None
    spelled = str(expression.doit())
    # (4, 3) read as an interval is empty, and an assignment or membership is read as a truth value.
    return None if spelled in ("EmptySet", "True", "False") else spelled


def answer_request(gold: str | None, answer: str) -> list[Any]:
    """Compare and spell; whatever sympy raises proves nothing equal."""
    equal, spelled = False, None
    try:
        got = parsed(answer)
        spelled = spelling(got[0]) if got else None
        equal = gold is not None and bool(got) and bool(verify(parsed(gold), got, timeout_seconds=None))
    except Exception:
        return [equal, spelled]
    return [equal, spelled]


def main() -> None:
    """Serve requests until the other side goes away."""
    logging.disable(logging.ERROR)  # math-verify warns that its time limits are off
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer_request("\\frac{1}{2}", "\\sqrt{2}")  # loads the grammar before the clock runs
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer_request(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
