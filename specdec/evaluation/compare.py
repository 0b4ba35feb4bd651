"""Several runs side by side: ``specdec report DIR [DIR...] --out FILE.html``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specdec.evaluation import page, sentences, tree, words
from specdec.evaluation.plots.runs import draw_run_plots, run_label
from specdec.evaluation.tables import Table
from specdec.evaluation.tree import Tree, dig

Runs = list[tuple[str, Tree]]
HEADER = [
    "run", "target", "head", "K", "τ", "α", "TPOT baseline → arm", "speed-up [95%]", "identical",
    "accuracy baseline → arm", "hardware", "commit",
]  # fmt: skip


def load_runs(paths: list[Path]) -> Runs:
    """``(name, result tree)`` of each run; a path is a directory that holds result.json, or such a file.

    Raises:
        ValueError: nothing to load, a file is absent, is no JSON, or was written by an older specdec.
    """
    if not paths:
        raise ValueError("no run to compare: name at least one directory that `specdec eval --out` wrote")
    files = [path / "result.json" if path.is_dir() else path for path in paths]
    return list(zip(_names(files), [_load(file) for file in files], strict=True))


def _load(file: Path) -> Tree:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: name a directory that `specdec eval --out` wrote, or its result.json")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no result: not valid JSON ({error}); measure again with `specdec eval`") from error
    if not isinstance(result, dict) or "summary" not in result:
        raise ValueError(f"{file} is no result of `specdec eval`: it has no summary; name the run's result.json")
    if not isinstance(result.get("cells"), list):
        raise ValueError(f"{file} was written by an older specdec (it has no cells): measure again with `specdec eval`")
    return result


def _names(files: list[Path]) -> list[str]:
    """Directory names with as many parents as it takes to tell them apart."""
    parts = [file.resolve().parent.parts if file.name == "result.json" else file.resolve().parts for file in files]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def render_comparison(runs: Runs) -> str:
    """The page as HTML text: a row a run, its plots, and a warning where runs can't be compared directly."""
    differences = list_differences(runs)
    rows = [_row(name, result) for name, result in runs]
    synthetic = [name for name, result in runs if run_label(name, result) != name]
    note = f"{', '.join(synthetic)} has {words.SYNTHETIC}." if synthetic else ""
    sections = [
        ("", page.paragraphs(differences, "warn") if differences else ""),
        ("Runs", page.table(Table(header=HEADER, rows=rows, note=note), names=3)),
        ("Plots", page.figures(draw_run_plots(runs))),
        (
            "What each run found",
            page.facts([(run_label(name, result), words.headline(result)) for name, result in runs]),
        ),
        ("Notes of the runs", page.facts(_notes(runs))),
    ]
    lede = "Each speed-up is against the run's own baseline, in the run's first condition, for its first other arm."
    return page.document(f"{len(runs)} run{'s' * (len(runs) != 1)} of specdec", lede, sections, width=1400)


def _row(name: str, result: Tree) -> list[str]:
    summary, arm, base = result.get("summary") or {}, next(iter(tree.others(result)), None), tree.baseline(result)
    cell = tree.first_cell(result).get("name")
    scores = [words.percent(tree.pooled_accuracy(result, cell, side)) for side in (base, arm)]
    width = tree.arm_facts(result, arm).get("num_speculative_tokens")
    sha = str(dig(result, "provenance", "git_sha") or "")[:9]
    return [
        run_label(name, result),
        words.name_of(dig(result, "provenance", "target")) or words.NOTHING,
        words.name_of(dig(result, "provenance", "head")) or words.NOTHING,
        words.count(width or dig(result, "provenance", "num_speculative_tokens") or None),
        words.number(summary.get("acceptance_length"), 2),
        words.percent(summary.get("acceptance_rate")),
        f"{words.seconds(summary.get('plain_tpot_sec'))} → {words.seconds(summary.get('spec_tpot_sec'))}",
        words.with_interval(summary.get("speedup_median"), summary.get("speedup_ci95"), words.times),
        words.percent(summary.get("greedy_identity_rate")),
        words.NOTHING if scores == [words.NOTHING] * 2 else " → ".join(scores),
        words.hardware(result),
        (sha or words.NOTHING) + ("+" if dig(result, "provenance", "git_dirty") else ""),
    ]


def list_differences(runs: Runs) -> list[str]:
    """What keeps runs from being compared directly, a sentence each; empty when they share all of it."""
    sentences = []
    for what, of in CONDITIONS.items():
        found: dict[str, list[str]] = {}
        for name, result in runs:
            found.setdefault(of(result), []).append(name)
        if len(found) > 1:
            sides = "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())
            sentences.append(f"The runs differ in {what}, so they can't be compared directly: {sides}.")
    return sentences


def _prompts(result: Tree) -> str:
    suites = {suite: dig(facts, "sha256") for suite, facts in (result.get("suites") or {}).items()}
    known = dig(result, "provenance", "prompts_sha256") or ", ".join(
        f"{suite} {str(sha)[:12]}" for suite, sha in sorted(suites.items())
    )
    return str(known)[:80] if known else "unknown"


def _cell_fact(show: Callable[[Any], str]) -> Callable[[Tree], str]:
    return lambda result: show(tree.first_cell(result)) if tree.cells(result) else "unknown"


CONDITIONS: dict[str, Callable[[Tree], str]] = {
    "target": lambda result: words.name_of(dig(result, "provenance", "target")) or "unknown",
    "hardware": words.hardware,
    "prompts": _prompts,
    "load": _cell_fact(words.load),
    "temperature or token budget": _cell_fact(words.condition),
}


def _notes(runs: Runs) -> list[tuple[str, str]]:
    return [(run_label(name, result), line) for name, result in runs for line in sentences.warnings(result)]
