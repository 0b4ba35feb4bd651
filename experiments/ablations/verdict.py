"""From finished runs to a table: how far each switch moves acceptance, and whether that is more than chance."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from experiments.ablations.arms import ARMS, DEFAULT, ArmRun

NUM_DRAWS = 20_000
ERROR_RATE = 0.05  # of the whole table: each of its comparisons gets an equal share (Bonferroni)


def judge(runs: list[ArmRun]) -> dict[str, Any]:
    """One row an arm, and the winner: the switch with the largest gain whose interval lies above 0.

    An arm is compared with the default over the seeds that both have finished. Intervals are drawn over held-out
    conversations and over seeds, the same draw for both: a seed's batches and a conversation's text are common to them.
    With one seed the noise of training is not in them, and nothing is called a gain or a loss.
    """
    by_arm: dict[str, dict[int, ArmRun]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, {})[run.seed] = run
    default = by_arm.get(DEFAULT, {})
    num_compared = max(1, len(by_arm) - 1)
    rows = [_row(arm, by_arm[arm], default, ERROR_RATE / num_compared) for arm in ARMS if arm in by_arm]
    gains = [row for row in rows if row["verdict"] == "gain"]
    winner = max(gains, key=lambda row: row["difference"])["arm"] if gains else None
    return {"arms": rows, "winner": winner, "missing": [arm for arm in ARMS if arm not in by_arm]}


def _row(arm: str, runs: dict[int, ArmRun], default: dict[int, ArmRun], error_rate: float) -> dict[str, Any]:
    seeds = sorted(runs.keys() & default.keys())
    own = _drawn(list(runs.values()), _draws(list(runs.values())))
    row = {
        "arm": arm,
        "settings": ARMS[arm],
        "num_seeds": len(runs),
        "acceptance_length": statistics.mean(run.acceptance_length for run in runs.values()),
        "ci95": _interval(own, 0.05),
        "per_position_rates": _mean_rates([run.per_position_rates for run in runs.values()]),
        "train_sec": statistics.mean(run.train_sec for run in runs.values()),
        "draft_vocab_size": max(run.draft_vocab_size for run in runs.values()),
        "difference": None,
        "difference_ci95": None,
        "verdict": "default" if arm == DEFAULT else "not compared",
    }
    if arm == DEFAULT or not seeds:
        return row
    flipped, unflipped = [runs[seed] for seed in seeds], [default[seed] for seed in seeds]
    draws = _draws(unflipped)
    moved = _drawn(flipped, draws) - _drawn(unflipped, draws)
    lengths = [[run.acceptance_length for run in side] for side in (flipped, unflipped)]
    low, high = _interval(moved, error_rate)
    row["difference"] = statistics.mean(lengths[0]) - statistics.mean(lengths[1])
    row["difference_ci95"] = _interval(moved, 0.05)
    row["verdict"] = "no difference shown"
    if len(seeds) > 1 and (low > 0 or high < 0):
        row["verdict"] = "gain" if low > 0 else "loss"
    return row


def _draws(runs: list[ArmRun]) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each conversation [D, C] and of each seed [D, S] in each of D bootstrap draws."""
    rng = np.random.default_rng(0)
    num_seeds = len(runs)
    sizes = len(runs[0].accepted_by_conversation), num_seeds
    conversations, seeds = (rng.multinomial(size, np.full(size, 1 / size), NUM_DRAWS) for size in sizes)
    # Drawn from few, the spread comes out sqrt(1 - 1 / n) too narrow: conversations are many, seeds are not.
    widened = 1 + (seeds - 1) * (num_seeds / max(1, num_seeds - 1)) ** 0.5
    return conversations, widened


def _drawn(runs: list[ArmRun], draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """[D] acceptance lengths, the mean over seeds of each draw."""
    conversations = sorted(runs[0].accepted_by_conversation)
    counts = [[run.accepted_by_conversation[name] for name in conversations] for run in runs]
    num_accepted = np.array([[sum(drafts) for drafts in run] for run in counts])  # [S, C]
    num_drafts = np.array([[len(drafts) for drafts in run] for run in counts])
    lengths = 1 + (draws[0] @ num_accepted.T) / (draws[0] @ num_drafts.T)  # [D, S]
    return (lengths * draws[1]).sum(-1) / len(runs)


def _interval(values: np.ndarray, error_rate: float) -> tuple[float, float]:
    low, high = np.quantile(values, [error_rate / 2, 1 - error_rate / 2])
    return float(low), float(high)


def _mean_rates(rates: list[list[float]]) -> list[float]:
    return [statistics.mean(position) for position in zip(*rates, strict=True)]


def markdown(found: dict[str, Any]) -> str:
    """The table, with the verdict above it."""
    rows = found["arms"]
    if found["winner"] is None:
        headline = "No switch beats the default beyond chance."
    else:
        best = next(row for row in rows if row["arm"] == found["winner"])
        headline = f"**{best['arm']}** (`{' '.join(best['settings'])}`) wins: τ {best['difference']:+.3f}."
    lines = [
        "# Switches of the training recipe, each flipped alone",
        "",
        headline,
        "",
        "| arm | settings | τ held out | against the default | by position | seeds | training s | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        rates = " / ".join(f"{rate:.2f}" for rate in row["per_position_rates"])
        moved = "" if row["difference"] is None else f"{row['difference']:+.3f} {_brackets(row['difference_ci95'])}"
        settings = " ".join(f"`{setting}`" for setting in row["settings"])
        lines.append(
            f"| {row['arm']} | {settings} | {row['acceptance_length']:.3f} {_brackets(row['ci95'])} | {moved} "
            f"| {rates} | {row['num_seeds']} | {row['train_sec']:.0f} | {row['verdict']} |"
        )
    notes = (
        "Intervals: 95 %, drawn over held-out conversations and seeds, the same draws for both sides of a comparison. "
        f"A verdict asks for an interval clear of 0 at {ERROR_RATE:.0%} over the whole table."
    )
    missing = f"\nNot run yet: {', '.join(found['missing'])}." if found["missing"] else ""
    return "\n".join([*lines, "", notes + missing]) + "\n"


def _brackets(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"
