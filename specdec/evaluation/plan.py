"""What is measured, in which order: cells, and in each the blocks of tasks that go through the arms in turn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from specdec.config import EvalConfig
from specdec.evaluation.load import CLOSED, block_size, check_arrival
from specdec.evaluation.records import Cell
from specdec.evaluation.suites import Item, Suite

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One conversation: its turns are sent one after the other."""

    item: Item
    sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One block and the order in which the arms take it."""

    cell: Cell
    suite: str
    repeat: int
    block: int
    tasks: tuple[Task, ...]
    arms: tuple[str, ...]


def cells_of(config: EvalConfig) -> list[Cell]:
    """Every combination of sampling, load and thinking budget; greedy cells first.

    Raises:
        ValueError: nothing to measure, or settings that contradict each other.
    """
    _check(config)
    modes: list[tuple[str, float | None, int]] = [(GREEDY, 0.0, 1)] if config.greedy else []
    temperatures: list[float | None] = [*config.temperature] or [None]
    if config.sampled:
        modes += [(SAMPLED, *pair) for pair in itertools.product(temperatures, config.num_samples)]
    budgets: list[int | None] = [*config.thinking_budgets] or [None]
    rates: list[float | None] = [*config.rate] or [None]
    cells = []
    for (mode, temperature, num_samples), concurrency, rate, budget in itertools.product(
        modes, config.concurrency, rates, budgets
    ):
        parts = [mode]
        parts += [f"T{temperature:g}"] if len(temperatures) > 1 and temperature else []
        parts += [f"c{concurrency}"] if len(config.concurrency) > 1 else []
        parts += [f"r{rate:g}"] if len(rates) > 1 and rate is not None else []
        parts += [f"b{budget}"] if len(budgets) > 1 else []
        parts += [f"n{num_samples}"] if len(config.num_samples) > 1 and mode == SAMPLED else []
        cells.append(
            Cell(
                name=" ".join(parts),
                temperature=temperature,
                concurrency=concurrency,
                arrival=config.arrival,
                rate=rate,
                max_new_tokens=config.max_new_tokens,
                thinking_budget=budget,
                num_samples=num_samples,
                # Greedy answers do not differ; sampled ones do, so more samples tell more than repeats.
                repeats=config.repeats if mode == GREEDY else 1,
            )
        )
    return cells


def _check(config: EvalConfig) -> None:
    if not config.greedy and not config.sampled:
        raise ValueError("nothing to measure: set eval.greedy or eval.sampled")
    temperatures = config.temperature
    if any(not temperature > 0 for temperature in temperatures) or len(set(temperatures)) < len(temperatures):
        raise ValueError(
            "eval.temperature is of the sampled cells: different numbers above 0; greedy has cells of its own"
        )
    for name in ("repeats", "max_new_tokens", "num_prompts"):
        if getattr(config, name) < 1:
            raise ValueError(f"eval.{name} must be at least 1")
    for name in ("concurrency", "thinking_budgets", "num_samples"):
        values = getattr(config, name)
        if any(value < 1 for value in values) or len(set(values)) < len(values):
            raise ValueError(f"eval.{name} must be different numbers of at least 1, got {values}")
    if not config.concurrency or not config.num_samples:
        raise ValueError("eval.concurrency and eval.num_samples need at least one number")
    if config.arrival != CLOSED and config.concurrency != [1]:
        raise ValueError("an open loop has no concurrency: drop --concurrency, or the arrival")
    rates: list[float | None] = [*config.rate] or [None]
    for rate in rates:
        check_arrival(config.arrival, rate)


def steps_of(cells: list[Cell], suites: list[Suite], arms: list[str], seed: int) -> Iterator[Step]:
    """Cell by cell and repeat by repeat; within a repeat the blocks of all suites are shuffled.

    The arms' order is drawn anew for each block, and every second repeat reverses it, so that first places balance.
    """
    for cell in cells:
        blocks = list(_blocks(cell, suites))
        for repeat in range(cell.repeats):
            order = random.Random(f"{seed}/{cell.name}/{repeat}").sample(range(len(blocks)), len(blocks))
            for number in order:
                turn = random.Random(f"{seed}/{cell.name}/{number}/{repeat // 2}").sample(arms, len(arms))
                suite, tasks = blocks[number]
                yield Step(
                    cell=cell,
                    suite=suite,
                    repeat=repeat,
                    block=number,
                    tasks=tasks,
                    arms=tuple(reversed(turn)) if repeat % 2 else tuple(turn),
                )


def _blocks(cell: Cell, suites: list[Suite]) -> Iterator[tuple[str, tuple[Task, ...]]]:
    for suite in suites:
        tasks = [Task(item=item, sample=sample) for sample in range(cell.num_samples) for item in suite.items]
        size = block_size(cell.arrival, cell.concurrency, len(tasks))
        yield from ((suite.name, tuple(tasks[i : i + size])) for i in range(0, len(tasks), size))


def num_requests(steps: list[Step]) -> int:
    """Requests of all arms together."""
    return sum(len(step.arms) * sum(len(task.item.turns) for task in step.tasks) for step in steps)
