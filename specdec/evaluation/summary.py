"""From records to figures: the tree that ``result.json`` holds and the report draws."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from specdec.evaluation.arms import PLAIN, SPEC
from specdec.evaluation.measure import GREEDY, Measurement, ModeRun, Record
from specdec.metrics import AcceptanceCounts, bootstrap_ci95, percentile, relative_spread, speedup, tokens_per_sec

SUMMARY_KEYS = (
    "acceptance_length", "acceptance_rate", "per_position_rates", "conditional_rates", "trained_acceptance_length",
    "plain_tpot_sec", "spec_tpot_sec", "speedup_median", "speedup_ci95", "greedy_identity_rate", "num_requests",
)  # fmt: skip
PERCENTILES = (50, 90, 99)
MAX_REPEAT_SPREAD = 0.1  # above it the machine was not quiet, and intervals over prompts say less than they seem to
MIN_PROMPTS_FOR_INTERVAL = 8


def build_result(
    measurement: Measurement,
    losslessness: dict[str, Any],
    trained: AcceptanceCounts | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The result tree. ``summary`` speaks of the greedy mode; ``modes`` has the same figures for each mode."""
    modes = {name: mode_figures(mode) for name, mode in measurement.modes.items()}
    greedy = modes.get(GREEDY) or mode_figures(ModeRun(name=GREEDY, temperature=0.0))
    greedy["greedy_identity_rate"] = losslessness["greedy_identity_rate"]
    greedy["trained_acceptance_length"] = trained.acceptance_length if trained else None
    greedy["trained_per_position_rates"] = trained.per_position_rates if trained else None
    doubts = timing_notes(modes)
    records = [record for mode in measurement.modes.values() for record in mode.records]
    return {
        "summary": {key: greedy[key] for key in SUMMARY_KEYS},
        "modes": modes,
        "losslessness": losslessness,
        "errors": count_errors(records),
        "notes": [*doubts, *measurement.notes],
        "timings_in_doubt": bool(doubts),
        "interrupted": measurement.interrupted,
        "client_cpu_share": measurement.client_cpu_share,
        "requests": [request_row(record) for record in records],
        "provenance": provenance,
    }


def mode_figures(mode: ModeRun) -> dict[str, Any]:
    """Every figure of one mode; what was not measured is None."""
    repeats = {arm: tpots_by_prompt(mode.records, arm) for arm in (PLAIN, SPEC)}
    tpots = {arm: {i: statistics.median(values) for i, values in repeats[arm].items()} for arm in repeats}
    # Of the plain arm: speculative timings also move with what is accepted, which sampling changes.
    spreads = [relative_spread(values) for values in repeats[PLAIN].values()]
    ratios = {
        index: speedup(tpots[PLAIN][index], tpots[SPEC][index])
        for index in sorted(tpots[PLAIN].keys() & tpots[SPEC].keys())
    }
    interval = bootstrap_ci95(list(ratios.values()))
    counts = mode.acceptance or AcceptanceCounts()
    return {
        "temperature": mode.temperature,
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "per_position_rates": counts.per_position_rates,
        "conditional_rates": counts.conditional_rates,
        "trained_acceptance_length": None,
        "trained_per_position_rates": None,
        "plain_tpot_sec": _median(list(tpots[PLAIN].values())),
        "spec_tpot_sec": _median(list(tpots[SPEC].values())),
        "speedup_median": _median(list(ratios.values())),
        "speedup_ci95": list(interval) if interval else None,
        "tpot_repeat_spread": _median([spread for spread in spreads if spread is not None]),
        "greedy_identity_rate": None,
        "num_requests": len(mode.records),
        "num_drafts": counts.num_drafts,
        "num_draft_tokens": counts.num_draft_tokens,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "speedup_by_prompt": {str(index): ratio for index, ratio in ratios.items()},
        "errors": count_errors(mode.records),
        "arms": {arm: arm_figures(mode, arm) for arm in (PLAIN, SPEC)},
    }


def tpots_by_prompt(records: list[Record], arm: str) -> dict[int, list[float]]:
    """Per prompt the TPOT (seconds) of each repeat on one arm; requests with an error have none."""
    by_prompt: dict[int, list[float]] = {}
    for record in records:
        tpot = record.result.tpot_sec
        if record.arm == arm and tpot is not None and tpot > 0:
            by_prompt.setdefault(record.prompt_index, []).append(tpot)
    return by_prompt


def timing_notes(modes: dict[str, dict[str, Any]]) -> list[str]:
    """Why the timings of a mode deserve less trust than their interval suggests; usually empty."""
    notes = []
    for name, figures in modes.items():
        spread, num_prompts = figures["tpot_repeat_spread"], len(figures["speedup_by_prompt"])
        if spread is not None and spread > MAX_REPEAT_SPREAD:
            notes.append(
                f"{name}: plain TPOT of the same prompt differed by {100 * spread:.0f}% between repeats: "
                "the machine was not quiet, so do not trust the speed-up"
            )
        if num_prompts < MIN_PROMPTS_FOR_INTERVAL:
            notes.append(
                f"{name}: only {num_prompts} prompts were timed on both servers; an interval wants "
                f"{MIN_PROMPTS_FOR_INTERVAL} or more"
            )
    return notes


def arm_figures(mode: ModeRun, arm: str) -> dict[str, Any]:
    """Latency percentiles in seconds and throughput of one arm, over its requests without error."""
    good = [record.result for record in mode.records if record.arm == arm and not record.result.error]
    samples: dict[str, list[float | None]] = {
        "ttft_sec": [result.ttft_sec for result in good],
        "tpot_sec": [result.tpot_sec for result in good],
        "e2e_sec": [result.e2e_sec for result in good],
        "chunk_gap_sec": [gap for result in good for gap in result.chunk_gaps_sec],
    }
    num_tokens = sum(result.num_output_tokens or 0 for result in good)
    return {
        **{name: percentiles([value for value in values if value is not None]) for name, values in samples.items()},
        "num_requests": sum(record.arm == arm for record in mode.records),
        "num_output_tokens": num_tokens,
        "busy_sec": mode.busy_sec[arm],
        "throughput_tok_per_sec": tokens_per_sec(num_tokens, mode.busy_sec[arm]),
    }


def percentiles(values: list[float]) -> dict[str, float | None]:
    """``p50``, ``p90`` and ``p99`` in the unit of ``values``."""
    return {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}


def count_errors(records: list[Record]) -> dict[str, int]:
    """Requests by kind of error; empty when all went well."""
    return dict(Counter(record.result.error for record in records if record.result.error))


def request_row(record: Record) -> dict[str, Any]:
    """One request without texts or token ids."""
    result = record.result
    return {
        "mode": record.mode,
        "repeat": record.repeat,
        "prompt_index": record.prompt_index,
        "arm": record.arm,
        "error": result.error,
        "error_detail": result.error_detail,
        "finish_reason": result.finish_reason,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_output_tokens": result.num_output_tokens,
        "num_chunks": len(result.chunk_gaps_sec) + (result.ttft_sec is not None),
        "ttft_sec": result.ttft_sec,
        "tpot_sec": result.tpot_sec,
        "e2e_sec": result.e2e_sec,
        "chunk_gap_max_sec": max(result.chunk_gaps_sec, default=None),
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
