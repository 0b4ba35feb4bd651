"""Did the answers stay right? Per suite and arm, and the difference that an arm makes.

An item counts once, however many samples it has: samples of one item are alike, so intervals resample items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from specdec.evaluation.records import BlockRun, Measurement, Record
from specdec.metrics import bootstrap_ci95

Z95 = 1.959964  # the 97.5 % quantile of the normal distribution


def accuracy_rows(measurement: Measurement) -> list[dict[str, Any]]:
    """One row for each cell, arm and suite in which at least one answer was checked.

    Only turn 0 of repeat 0 counts: the later repeats of a greedy cell would be the same answers again.
    An answer that the checker could not find counts as wrong. A request that failed says nothing about the
    arm's answers: it is left out, and counted in ``num_failed``.

    Returns:
        ``pass_at_1`` is the mean over items of the mean over samples, ``maj_at_n`` the share of items whose most
        frequent answer is right (None with one sample an item). Both in [0, 1], with 95 % intervals over items.
        ``sec_per_answer`` is what one sample costs: the time the arm was busy over the answers it gave.
    """
    rows = []
    for cell in measurement.cells:
        for suite in _suites(measurement):
            for arm in measurement.arms:  # side by side, as they are compared
                records = _counted(measurement, cell.name, arm, suite)
                scored = _by_item(records)
                if scored:
                    spent = _sec_per_answer(measurement.of(cell.name, arm, suite))
                    place = {"cell": cell.name, "arm": arm, "suite": suite}
                    rows.append({**place, **_figures(records, scored), "sec_per_answer": spent})
    return rows


def accuracy_differences(measurement: Measurement) -> list[dict[str, Any]]:
    """pass@1 of each arm less that of the baseline, over the items that both answered; intervals over items.

    Returns:
        Rows with ``difference`` in [-1, 1] (negative: the arm answers worse), ``ci95`` and ``num_items``.
    """
    rows = []
    for cell in measurement.cells:
        for suite in _suites(measurement):
            baseline = _by_item(_counted(measurement, cell.name, measurement.baseline, suite))
            for arm in measurement.arms:
                if arm == measurement.baseline:
                    continue
                other = _by_item(_counted(measurement, cell.name, arm, suite))
                deltas = [
                    _share_correct(other[item]) - _share_correct(baseline[item]) for item in baseline if item in other
                ]
                if deltas:
                    rows.append(
                        {
                            "cell": cell.name, "suite": suite, "arm": arm, "difference": fmean(deltas),
                            "ci95": list(_difference_ci95(deltas)), "num_items": len(deltas),
                        }
                    )  # fmt: skip
    return rows


def wilson_ci95(share: float, num_items: int) -> tuple[float, float]:
    """Wilson score interval of a share of ``num_items``; not degenerate where the share is 0 or 1.

    Raises:
        ValueError: no items.
    """
    if num_items < 1:
        raise ValueError("a Wilson interval needs at least one item")
    z2 = Z95 * Z95 / num_items
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def majority_correct(samples: Sequence[Record]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones the answer seen first wins.

    Samples without an answer do not vote. Answers are told apart as strings: "1/2" and "0.5" are two.
    """
    votes: dict[str, list[Record]] = {}
    for record in sorted(samples, key=lambda record: record.sample):
        if record.answer is not None:
            votes.setdefault(record.answer, []).append(record)
    if not votes:
        return False
    winners = max(votes.values(), key=len)  # the first of the largest: dicts keep the order of arrival
    return all(record.correct for record in winners)


def _suites(measurement: Measurement) -> list[str]:
    return list(dict.fromkeys(run.suite for run in measurement.runs))


def _counted(measurement: Measurement, cell: str, arm: str, suite: str) -> list[Record]:
    return [
        record for record in measurement.records(cell, arm, suite) if record.turn == 0 and record.repeat == 0
    ]  # fmt: skip


def _by_item(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The checked samples of each item."""
    items: dict[str, list[Record]] = {}
    for record in records:
        if record.correct is not None and record.result.error is None:
            items.setdefault(record.item_id, []).append(record)
    return items


def _figures(records: Sequence[Record], scored: dict[str, list[Record]]) -> dict[str, Any]:
    shares = [_share_correct(samples) for samples in scored.values()]
    checked = [record for samples in scored.values() for record in samples]
    lengths = [n for record in checked if (n := record.result.num_output_tokens) is not None]
    num_samples = max(len(samples) for samples in scored.values())
    majorities = [float(majority_correct(samples)) for samples in scored.values()] if num_samples > 1 else []
    return {
        "num_items": len(scored),
        "num_samples": num_samples,
        "num_unanswered": sum(record.answer is None for record in checked),
        "num_failed": sum(record.result.error is not None for record in records),
        "pass_at_1": fmean(shares),
        "pass_at_1_ci95": list(_share_ci95(shares)),
        "maj_at_n": fmean(majorities) if majorities else None,
        "maj_at_n_ci95": list(_share_ci95(majorities)) if majorities else None,
        "mean_output_tokens": fmean(lengths) if lengths else None,
    }


def _sec_per_answer(runs: Sequence[BlockRun]) -> float | None:
    num_answers = sum(record.turn == 0 for run in runs for record in run.records)
    return sum(run.busy_sec for run in runs) / num_answers if num_answers else None


def _share_correct(samples: Sequence[Record]) -> float:
    return fmean(bool(record.correct) for record in samples)


def _share_ci95(shares: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean over items. Where all items agree, resampling them would claim certainty: Wilson then."""
    interval = bootstrap_ci95(shares, fmean) if min(shares) < max(shares) else None
    return interval or wilson_ci95(fmean(shares), len(shares))


def _difference_ci95(deltas: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean paired difference.

    Where all items agree, what can still hide is a share of items that differ and that none was seen of; Wilson
    bounds that share, and each such item moves the mean by at most 1.
    """
    if min(deltas) < max(deltas):
        interval = bootstrap_ci95(deltas, fmean)
        assert interval is not None
        return interval
    unseen = wilson_ci95(0.0, len(deltas))[1]
    return max(-1.0, deltas[0] - unseen), min(1.0, deltas[0] + unseen)
