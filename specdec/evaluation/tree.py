"""Reading a result tree in which anything may be missing: an interrupted run still gets its report."""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]


def dig(tree: Any, *path: str) -> Any:
    """The value under a path of keys; None where a step is absent, null or no mapping."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def cells(result: Tree) -> list[Tree]:
    """The conditions, in the order they were measured."""
    return [cell for cell in result.get("cells") or [] if cell]


def first_cell(result: Tree) -> Tree:
    """The condition that headline, cards and distributions speak of; empty when none was measured."""
    return next(iter(cells(result)), {})


def arm_names(result: Tree) -> list[str]:
    """Every arm, the baseline first, the rest in the run's order."""
    arms = result.get("arms") or []
    names = [arm["name"] for arm in sorted(arms, key=lambda arm: not arm.get("baseline"))]
    return names or list(first_cell(result).get("arms") or {})


def baseline(result: Tree) -> str | None:
    """The arm that the others are compared with."""
    return next(iter(arm_names(result)), None)


def others(result: Tree) -> list[str]:
    """Every arm but the baseline."""
    return arm_names(result)[1:]


def arm_facts(result: Tree, arm: str | None) -> Tree:
    """What the run wrote down of one arm; empty when it is not listed."""
    return next((facts for facts in result.get("arms") or [] if facts.get("name") == arm), {})


def is_synthetic(result: Tree, arm: str | None) -> bool:
    """Whether acceptance was dictated to the server instead of earned by a head."""
    return bool(arm_facts(result, arm).get("synthetic"))


def load_of(cell: Tree) -> float | None:
    """How hard the cell pushed: requests per second of an open loop, else requests in flight."""
    rate = cell.get("rate")
    return cell.get("concurrency") if rate is None else rate


def sweeps(result: Tree) -> list[list[Tree]]:
    """Groups of cells that differ in their load alone, at least two loads each, the lightest load first."""
    groups: dict[tuple[Any, ...], list[Tree]] = {}
    for cell in cells(result):
        if load_of(cell) is not None:
            names = ("temperature", "arrival", "max_new_tokens", "thinking_budget", "num_samples")
            groups.setdefault(tuple(cell.get(name) for name in names), []).append(cell)
    return [sorted(group, key=_load) for group in groups.values() if len({load_of(cell) for cell in group}) > 1]


def budget_sweeps(result: Tree) -> list[list[Tree]]:
    """Groups of cells that differ in thinking budget or number of samples alone, at least two settings each."""
    groups: dict[tuple[Any, ...], list[Tree]] = {}
    for cell in cells(result):
        names = ("temperature", "arrival", "rate", "concurrency", "max_new_tokens")
        groups.setdefault(tuple(cell.get(name) for name in names), []).append(cell)
    return [
        group
        for group in groups.values()
        if len({(cell.get("thinking_budget"), cell.get("num_samples")) for cell in group}) > 1
    ]


def _load(cell: Tree) -> float:
    return load_of(cell) or 0.0


def greedy_rows(result: Tree) -> list[Tree]:
    """Comparisons of greedy outputs, but for synthetic arms: dictated acceptance takes wrong tokens on purpose."""
    rows = dig(result, "losslessness", "greedy") or []
    return [row for row in rows if row and not is_synthetic(result, row.get("arm"))]


def accuracy_rows(result: Tree, cell: str | None = None, arm: str | None = None) -> list[Tree]:
    """Rows of the accuracy table that were scored, of one cell and arm or of all."""
    return [
        row
        for row in result.get("accuracy") or []
        if row.get("pass_at_1") is not None
        and (cell is None or row.get("cell") == cell)
        and (arm is None or row.get("arm") == arm)
    ]


def pooled_accuracy(result: Tree, cell: str | None, arm: str | None) -> float | None:
    """pass@1 over all suites of one cell and arm, each item counted once; None when nothing was scored."""
    rows = accuracy_rows(result, cell, arm) if cell is not None and arm is not None else []
    num_items = sum(row.get("num_items") or 0 for row in rows)
    return sum(row["pass_at_1"] * (row.get("num_items") or 0) for row in rows) / num_items if num_items else None


def good_requests(result: Tree, cell: str | None, arm: str) -> list[Tree]:
    """Request rows of one cell and arm that ended without error."""
    return [
        row
        for row in result.get("requests") or []
        if row.get("cell") == cell and row.get("arm") == arm and not row.get("error")
    ]
