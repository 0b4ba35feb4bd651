"""The result tree: what ``result.json`` holds and the report draws."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from specdec.evaluation.accuracy import accuracy_differences, accuracy_rows
from specdec.evaluation.arms import Arm
from specdec.evaluation.cost import break_even, cost_points
from specdec.evaluation.figures import Prices, arm_figures, comparison
from specdec.evaluation.load import ROUNDS
from specdec.evaluation.records import BlockRun, Cell, Measurement, Record
from specdec.evaluation.suites import Suite, is_graded
from specdec.metrics import AcceptanceCounts

LATENCIES = ("ttft_sec", "ttfvt_sec", "tpot_sec", "chunk_gap_sec", "e2e_sec")
MAX_REPEAT_SPREAD = 0.1  # above it the machine was not quiet, and intervals over prompts say less than they seem to
MIN_TASKS_FOR_INTERVAL = 8
MAX_CLIENT_CPU_SHARE = 0.5  # of one core: above it the client may be what is timed
MAX_LAG_SHARE, MIN_LAG_SEC = 0.1, 0.005  # of the gap between chunks; less than a few milliseconds is no lag


def build_result(
    measurement: Measurement,
    arms: dict[str, Arm],
    suites: list[Suite],
    losslessness: dict[str, Any],
    trained: AcceptanceCounts | None,
    prices: Prices,
    provenance: dict[str, Any],
    plain_step_bound_sec: float | None = None,
) -> dict[str, Any]:
    """The whole tree. ``summary`` and ``latency`` speak of the first cell: the baseline and the first other arm."""
    cells = [_cell_figures(measurement, cell, suites, prices) for cell in measurement.cells]
    arm_rows = [_arm_row(arm, measurement.baseline) for arm in arms.values()]
    records = [record for run in measurement.runs for record in run.records]
    doubts = [*timing_notes(cells, measurement.baseline), *client_notes(cells)]
    points = cost_points(cells, arm_rows, plain_step_bound_sec)
    return {
        "summary": _summary(measurement, cells[0], losslessness, trained),
        "arms": arm_rows,
        "suites": {suite.name: _suite_row(suite) for suite in suites},
        "cells": cells,
        "latency": {arm: {name: figures[name] for name in LATENCIES} for arm, figures in cells[0]["arms"].items()},
        "accuracy": accuracy_rows(measurement),
        "accuracy_differences": accuracy_differences(measurement),
        "losslessness": losslessness,
        "cost_model": points,
        "break_even": break_even(points),
        "errors": count_errors(records),
        "notes": [*doubts, *lag_notes(cells), *_answer_notes(suites), *measurement.notes],
        "timings_in_doubt": bool(doubts),
        "interrupted": measurement.interrupted,
        "client_cpu_share": _client_cpu_share(measurement.runs),
        "price_per_hour": prices.price_per_hour,
        "slo": {"ttft_sec": prices.slo_ttft_sec, "tpot_sec": prices.slo_tpot_sec} if prices.has_slo else None,
        "requests": [{**request_row(record), "block": run.block} for run in measurement.runs for record in run.records],
        "blocks": [_block_row(run) for run in measurement.runs],
        "provenance": provenance,
    }


def _block_row(run: BlockRun) -> dict[str, Any]:
    """What a ratio of any two arms needs: tokens of good answers, and the seconds they took together."""
    return {
        **{name: getattr(run, name) for name in ("cell", "arm", "suite", "repeat", "block", "busy_sec")},
        "num_output_tokens": sum(record.result.num_output_tokens for record in run.records if not record.result.error),
    }


def _cell_figures(measurement: Measurement, cell: Cell, suites: list[Suite], prices: Prices) -> dict[str, Any]:
    def both(suite: str | None) -> dict[str, Any]:
        runs = {arm: measurement.of(cell.name, arm, suite) for arm in measurement.arms}
        baseline = runs[measurement.baseline]
        return {
            "arms": {arm: arm_figures(runs[arm], prices) for arm in runs},
            "comparisons": {
                arm: comparison(baseline, runs[arm]) for arm in measurement.arms if arm != measurement.baseline
            },
        }

    return {**dataclasses.asdict(cell), **both(None), "suites": {suite.name: both(suite.name) for suite in suites}}


def _summary(
    measurement: Measurement, cell: dict[str, Any], losslessness: dict[str, Any], trained: AcceptanceCounts | None
) -> dict[str, Any]:
    """The figures that other tools read; the arm is the first after the baseline."""
    arm = next(name for name in measurement.arms if name != measurement.baseline)
    plain, ours, compared = cell["arms"][measurement.baseline], cell["arms"][arm], cell["comparisons"][arm]
    acceptance = ours["acceptance"] or {}
    identity = [row for row in losslessness["greedy"] if row["arm"] == arm and row["cell"] == cell["name"]]
    return {
        "acceptance_length": acceptance.get("acceptance_length"),
        "acceptance_rate": acceptance.get("acceptance_rate"),
        "per_position_rates": acceptance.get("per_position_rates", []),
        "conditional_rates": acceptance.get("conditional_rates", []),
        "trained_acceptance_length": trained.acceptance_length if trained else None,
        "trained_per_position_rates": trained.per_position_rates if trained else [],
        "plain_tpot_sec": plain["tpot_sec"]["p50"],
        "spec_tpot_sec": ours["tpot_sec"]["p50"],
        "speedup_median": compared["speedup_median"],
        "speedup_ci95": compared["speedup_ci95"],
        "greedy_identity_rate": identity[0]["greedy_identity_rate"] if identity else None,
        "num_requests": plain["num_requests"] + ours["num_requests"],
    }


def _arm_row(arm: Arm, baseline: str) -> dict[str, Any]:
    return {
        "name": arm.name,
        "baseline": arm.name == baseline,
        "options": arm.options,
        "num_speculative_tokens": arm.num_speculative_tokens,
        "synthetic": arm.synthetic,
        "url": arm.url,
        "model": arm.model,
        "dtype": arm.dtype,
    }


def _suite_row(suite: Suite) -> dict[str, Any]:
    return {
        "num_items": len(suite.items),
        # A result travels: where the file lay on this machine is of no use elsewhere, and its hash is beside it.
        "source": Path(suite.source).name if Path(suite.source).is_absolute() else suite.source,
        "sha256": suite.sha256,
        "has_answers": any(item.answer is not None for item in suite.items),
    }


def timing_notes(cells: list[dict[str, Any]], baseline: str) -> list[str]:
    """Why the timings of a cell deserve less trust than their interval suggests; usually empty."""
    notes = []
    for cell in cells:
        spread = cell["arms"][baseline]["tpot_repeat_spread"]
        if spread is not None and spread > MAX_REPEAT_SPREAD:
            notes.append(
                f"{cell['name']}: TPOT of the same prompt on the {baseline} arm differed by {100 * spread:.0f}% "
                "between repeats: the machine was not quiet, so do not trust the speed-up"
            )
        num_pairs = max((each["num_pairs"] for each in cell["comparisons"].values()), default=0)
        if num_pairs < MIN_TASKS_FOR_INTERVAL:
            notes.append(
                f"{cell['name']}: only {num_pairs} prompts were timed on both arms; an interval wants "
                f"{MIN_TASKS_FOR_INTERVAL} or more"
            )
        elif all(each["speedup_ci95"] is None for each in cell["comparisons"].values()):
            notes.append(
                f"{cell['name']}: no interval, for its prompts went in fewer than three blocks ({ROUNDS} prompts "
                "a place in flight; an open loop is one block of each suite): give it more prompts"
            )
    return notes


def client_notes(cells: list[dict[str, Any]]) -> list[str]:
    """Where the client may have been the bottleneck; usually empty."""
    return [
        f"{cell['name']}: the client itself used {100 * share:.0f}% of a core while {arm} was measured: "
        "the timings may be its own"
        for cell in cells
        for arm, figures in cell["arms"].items()
        if (share := figures["client_cpu_share"]) is not None and share > MAX_CLIENT_CPU_SHARE
    ]


def lag_notes(cells: list[dict[str, Any]]) -> list[str]:
    """Where chunks may have been noticed late: it blurs gaps and first tokens, and TPOT hardly."""
    notes = []
    for cell in cells:
        for arm, figures in cell["arms"].items():
            lag_sec, gap_sec = figures["client_lag_sec"]["p90"], figures["step_sec_p50"]
            if lag_sec is not None and gap_sec is not None and lag_sec > max(MIN_LAG_SEC, MAX_LAG_SHARE * gap_sec):
                notes.append(
                    f"{cell['name']}: one time in ten the client woke {1e3 * lag_sec:.0f} ms late or more while {arm} "
                    f"was measured, with {1e3 * gap_sec:.0f} ms between chunks: its cores were busy"
                )
    return notes


def _answer_notes(suites: list[Suite]) -> list[str]:
    notes = []
    for suite in suites:
        without = sum(item.answer is None for item in suite.items)
        if without and (suite.check is not None or is_graded(suite.name)):
            notes.append(f"{suite.name}: {without} of {len(suite.items)} items have no gold answer and are not graded")
    return notes


def _client_cpu_share(runs: list[BlockRun]) -> float | None:
    """Of one core, while requests were in flight: near 1 the client is the bottleneck."""
    busy_sec = sum(run.busy_sec for run in runs)
    return sum(run.client_cpu_sec for run in runs) / busy_sec if busy_sec else None


def count_errors(records: list[Record]) -> dict[str, int]:
    """Requests by kind of trouble; empty when all went well. A clock that jumped does not spoil a request."""
    counts = Counter(record.result.error for record in records if record.result.error)
    jumps = sum(record.result.clock_jump_sec != 0 for record in records)
    return {**counts, **({"clock_jump": jumps} if jumps else {})}


def request_row(record: Record) -> dict[str, Any]:
    """One request without texts or token ids."""
    result, counts = record.result, record.result.acceptance
    return {
        **{name: getattr(record, name) for name in ("cell", "arm", "suite", "item_id", "repeat", "sample", "turn")},
        "error": result.error,
        "error_detail": result.error_detail,
        "finish_reason": result.finish_reason,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_output_tokens": result.num_output_tokens,
        "num_think_tokens": result.num_think_tokens,
        "num_chunks": len(result.chunk_gaps_sec) + (result.ttft_sec is not None),
        "ttft_sec": result.ttft_sec,
        "ttfvt_sec": result.ttfvt_sec,
        "tpot_sec": result.tpot_sec,
        "e2e_sec": result.e2e_sec,
        "chunk_gap_max_sec": max(result.chunk_gaps_sec, default=None),
        "correct": record.correct,
        "num_drafts": counts.num_drafts,
        "num_accepted_tokens": counts.num_accepted_tokens,
    }
