"""What a suite is made of, and how a part of it is drawn."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.record import text_sha256
from specdec.traces import THINK_CLOSE, THINK_OPEN

BOXED_DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."  # DeepSeek's for maths


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One task of a suite. ``turns`` are the user's, already with the suite's directive; usually there is one."""

    suite: str
    id: str
    turns: tuple[str, ...]
    answer: str | None = None  # gold; None: nothing to check
    category: str | None = None
    context: dict[str, Any] = field(default_factory=dict)  # what the checker needs besides, e.g. the tests of code


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a checker says of one response."""

    correct: bool | None  # None: the item has no gold answer
    answer: str | None  # extracted and normalised, so that equal answers vote together; None: there is none
    reason: str | None = None  # why it is not correct


Checker = Callable[[Item, str], Verdict]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Items and how to check them. ``sha256`` covers the ids, turns and answers of exactly these items."""

    name: str
    source: str  # a file, a Hugging Face datasets id, or "reasoning-gym VERSION"
    sha256: str
    items: tuple[Item, ...]
    check: Checker | None  # None: no item has a gold answer


def make_suite(name: str, source: str, items: Sequence[Item], check: Checker | None) -> Suite:
    """A suite of ``items``, hashed. The checker is dropped when no item has an answer."""
    parts = [part for item in items for part in (item.id, str(len(item.turns)), *item.turns, repr(item.answer))]
    checkable = any(item.answer is not None for item in items)
    return Suite(
        name=name, source=source, sha256=text_sha256(*parts), items=tuple(items), check=check if checkable else None
    )


def answer_text(response: str) -> str | None:
    """What follows the thinking; None while a think tag is still open: such a response has no answer."""
    _, close, tail = response.rpartition(THINK_CLOSE)
    if THINK_OPEN in (tail if close else response):
        return None
    return tail.strip() if close else response.strip()


def refuse_duplicate_ids(items: Iterable[Item], source: str) -> None:
    """Two items of one id would be counted as one task.

    Raises:
        ValueError: naming the id.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{source}: the id {item.id!r} occurs twice; ids name tasks, give each line its own")
        seen.add(item.id)


def draw(items: Sequence[Item], num_items: int | None, seed: int, balanced: bool = False) -> list[Item]:
    """A random subset in the original order: the same for the same arguments.

    ``balanced`` takes from each category in turn, so that counts differ by one at most while supplies last.
    """
    if num_items is None or num_items >= len(items):
        return list(items)
    if num_items < 1:
        raise ValueError(f"the number of items is {num_items}; give at least 1, or none for all")
    groups: dict[str | None, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.category if balanced else None].append(index)
    generator = random.Random(seed)
    columns = list(groups.values())
    for column in columns:
        generator.shuffle(column)
    generator.shuffle(columns)  # which categories get the odd ones
    deepest = max(map(len, columns))
    in_turn = [column[depth] for depth in range(deepest) for column in columns if depth < len(column)]
    return [items[index] for index in sorted(in_turn[:num_items])]
