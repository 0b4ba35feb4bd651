"""Benchmark suites and their checkers.

A suite is a list of tasks with, where there is a gold answer, a function that judges responses. Prompts follow
the practice for R1 models: no system prompt, and the instruction on the answer's form inside the user's turn.
"""

from specdec.evaluation.suites.base import Item, Suite, Verdict
from specdec.evaluation.suites.loading import is_graded, load_suite, suite_names
from specdec.evaluation.suites.random_tokens import looks_like_random_tokens

__all__ = ["Item", "Suite", "Verdict", "is_graded", "load_suite", "looks_like_random_tokens", "suite_names"]
