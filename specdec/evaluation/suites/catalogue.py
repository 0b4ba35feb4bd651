"""The named suites: where each comes from, and how a row of it becomes an item."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from specdec.conventions import ID_FIELDS, PROMPT_FIELDS, first
from specdec.evaluation.suites.base import BOXED_DIRECTIVE, Checker, Item
from specdec.evaluation.suites.code import check_code
from specdec.evaluation.suites.maths import check_maths
from specdec.hub_rows import HubName
from specdec.rows import Row

CATEGORY_FIELDS = ("category", "subject")
CODE_DIRECTIVE = "Complete the following Python function. Give the whole function in one ```python code block."
# Spec-Bench took these from MT-bench and counts them as one of its six tasks.
MT_BENCH_CATEGORIES = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteRecipe:
    """How to get a suite. ``to_item`` takes (suite, where, row number, row)."""

    to_item: Callable[[str, str, int, Row], Item]
    check: Checker | None
    hub: tuple[HubName, ...] = ()  # tried in this order
    balanced: bool = False  # over categories, when a part is drawn


def prompt_of(where: str, row: Row) -> str:
    """The row's prompt, whatever it is called.

    Raises:
        ValueError: there is none, or it is no text.
    """
    prompt = first(row, PROMPT_FIELDS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: no prompt; want text in one of {', '.join(PROMPT_FIELDS)}, has {sorted(row)}")
    return prompt


def turns_of(where: str, row: Row) -> tuple[str, ...]:
    """The user's turns: ``turns``, or a list of prompts, or the one prompt.

    Raises:
        ValueError: no turn, or one that is no text.
    """
    turns = row.get("turns") or row.get("prompt")
    if not isinstance(turns, list):
        return (prompt_of(where, row),)
    if not all(isinstance(turn, str) and turn.strip() for turn in turns) or not turns:
        raise ValueError(f"{where}: turns must be a list of texts, one for each of the user's turns")
    return tuple(turns)


def id_of(suite: str, number: int, row: Row) -> str:
    """The row's id, or its place in the file."""
    found = first(row, ID_FIELDS)
    return f"{suite}-{number}" if found is None else str(found)


def category_of(row: Row) -> str | None:
    """The row's category, as text."""
    found = first(row, CATEGORY_FIELDS)
    return None if found is None else str(found)


def with_directive(prompt: str) -> str:
    """A maths prompt that asks for a boxed answer, once."""
    return prompt if "\\boxed" in prompt else f"{prompt.strip()}\n\n{BOXED_DIRECTIVE}"


def maths_item(suite: str, where: str, number: int, row: Row) -> Item:
    """GSM8K, MATH-500, AIME. GSM8K's own answers are worked solutions that end in ``#### 72``."""
    answer = first(row, ("answer", "Answer", "expected_answer"))
    if isinstance(answer, list | dict) or (answer is not None and not str(answer).strip()):
        raise ValueError(f"{where}: the field 'answer' must be text or a number; leave it out where there is none")
    return Item(
        suite=suite,
        id=id_of(suite, number, row),
        turns=(with_directive(prompt_of(where, row)),),
        answer=None if answer is None else re.split(r"####", str(answer))[-1].strip(),
        category=category_of(row),
    )


def code_item(suite: str, where: str, number: int, row: Row) -> Item:
    """HumanEval. Gold is the canonical solution; the tests judge."""
    prompt = row.get("prompt")
    missing = [name for name in ("prompt", "entry_point", "test") if not isinstance(row.get(name), str)]
    if missing or not str(row["entry_point"]).isidentifier():
        raise ValueError(f"{where}: {suite} needs prompt, entry_point and test as text, lacks {missing or 'a name'}")
    return Item(
        suite=suite,
        id=id_of(suite, number, row),
        turns=(f"{CODE_DIRECTIVE}\n\n```python\n{str(prompt).rstrip()}\n```",),
        answer=str(first(row, ("answer", "canonical_solution")) or row["entry_point"]),
        category=category_of(row) or "code",
        context={"prompt": prompt, "entry_point": row["entry_point"], "test": row["test"]},
    )


def dialogue_item(suite: str, where: str, number: int, row: Row) -> Item:
    """MT-bench: every turn, no gold answer."""
    return Item(
        suite=suite, id=id_of(suite, number, row), turns=turns_of(where, row), answer=None, category=category_of(row)
    )


def spec_bench_item(suite: str, where: str, number: int, row: Row) -> Item:
    """Spec-Bench: its category is one of its six tasks, "multi_turn" for what it took from MT-bench."""
    category = category_of(row)
    return Item(
        suite=suite,
        id=id_of(suite, number, row),
        turns=turns_of(where, row),
        category="multi_turn" if category in MT_BENCH_CATEGORIES else category,
        context={"category": category},
    )


RECIPES: dict[str, SuiteRecipe] = {
    "gsm8k": SuiteRecipe(
        to_item=maths_item, check=check_maths, hub=(HubName(dataset="openai/gsm8k", config="main", split="test"),)
    ),
    "math500": SuiteRecipe(
        to_item=maths_item, check=check_maths, hub=(HubName(dataset="HuggingFaceH4/MATH-500", split="test"),)
    ),
    "aime24": SuiteRecipe(
        to_item=maths_item,
        check=check_maths,
        hub=(
            HubName(dataset="HuggingFaceH4/aime_2024", split="train"),
            HubName(dataset="Maxwell-Jia/AIME_2024", split="train"),
        ),
    ),
    "aime25": SuiteRecipe(
        to_item=maths_item,
        check=check_maths,
        hub=(
            HubName(dataset="math-ai/aime25", split="test"),
            HubName(dataset="yentinglin/aime_2025", split="train"),
        ),
    ),
    "humaneval": SuiteRecipe(
        to_item=code_item, check=check_code, hub=(HubName(dataset="openai/openai_humaneval", split="test"),)
    ),
    "mt_bench": SuiteRecipe(
        to_item=dialogue_item,
        check=None,
        hub=(HubName(dataset="HuggingFaceH4/mt_bench_prompts", split="train"),),
        balanced=True,
    ),
    "spec_bench": SuiteRecipe(to_item=spec_bench_item, check=None, balanced=True),
}
