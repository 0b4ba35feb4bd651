"""From requests to figures: what one arm did under one condition, and how two arms compare."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from specdec.evaluation.records import BlockRun, Record, RequestResult
from specdec.metrics import (
    OUTPUT_BUCKET_TOKENS,
    AcceptanceCounts,
    bootstrap_ci95,
    percentile,
    relative_spread,
    speedup,
    tokens_per_sec,
)

PERCENTILES = (50, 90, 99)
MIN_PLACED_SHARE = 0.9  # of the steps whose place in the output must be certain to speak of places at all


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What figures are weighed with; None leaves them out."""

    price_per_hour: float | None = None
    slo_ttft_sec: float | None = None
    slo_tpot_sec: float | None = None

    @property
    def has_slo(self) -> bool:
        return self.slo_ttft_sec is not None or self.slo_tpot_sec is not None

    def meets_slo(self, result: RequestResult) -> bool:
        """Whether a request was fast enough; a request of one token has no TPOT to miss."""
        ttft, tpot = result.ttft_sec, result.tpot_sec
        in_time = self.slo_ttft_sec is None or (ttft is not None and ttft <= self.slo_ttft_sec)
        return in_time and (self.slo_tpot_sec is None or tpot is None or tpot <= self.slo_tpot_sec)


def arm_figures(runs: list[BlockRun], prices: Prices) -> dict[str, Any]:
    """Every figure of one arm over these blocks; what was not measured is None."""
    records = [record for run in runs for record in run.records]
    good = [record.result for record in records if not record.result.error]
    busy_sec = sum(run.busy_sec for run in runs)
    num_tokens = sum(result.num_output_tokens or 0 for result in good)
    steps = [run.num_engine_steps for run in runs]
    num_steps = sum(step or 0 for step in steps) if steps and None not in steps else None
    return {
        **latency(good),
        "step_sec_p50": percentile([gap for result in good for gap in result.chunk_gaps_sec], 50),
        "num_requests": len(records),
        "num_errors": len(records) - len(good),
        "num_output_tokens": num_tokens,
        "busy_sec": busy_sec,
        "client_cpu_share": sum(run.client_cpu_sec for run in runs) / busy_sec if busy_sec else None,
        "client_lag_sec": _percentiles([lag for run in runs for lag in run.client_lags_sec]),
        "throughput_tok_per_sec": tokens_per_sec(num_tokens, busy_sec),
        "num_engine_steps": num_steps,
        "tokens_per_step": num_tokens / num_steps if num_steps else None,
        **_goodput(good, len(records), busy_sec, prices),
        "output_tokens": _lengths([result.num_output_tokens or 0 for result in good]),
        "think_tokens_mean": _mean([result.num_think_tokens for result in good]),
        "acceptance": acceptance_figures(runs, good),
        "tpot_repeat_spread": _repeat_spread(records),
        **_cost(num_tokens, len(good), busy_sec, prices),
    }


def latency(results: list[RequestResult]) -> dict[str, dict[str, float | None]]:
    """Percentiles in seconds."""
    samples: dict[str, list[float | None]] = {
        "ttft_sec": [result.ttft_sec for result in results],
        "ttfvt_sec": [result.ttfvt_sec for result in results],
        "tpot_sec": [result.tpot_sec for result in results],
        "e2e_sec": [result.e2e_sec for result in results],
        "chunk_gap_sec": [gap for result in results for gap in result.chunk_gaps_sec],
    }
    return {name: _percentiles([value for value in values if value is not None]) for name, values in samples.items()}


def _percentiles(values: list[float]) -> dict[str, float | None]:
    return {f"p{p}": percentile(values, p) for p in PERCENTILES}


def _goodput(good: list[RequestResult], num_requests: int, busy_sec: float, prices: Prices) -> dict[str, Any]:
    if not prices.has_slo or not num_requests:
        return {"goodput_tok_per_sec": None, "slo_share": None}
    met = [result for result in good if prices.meets_slo(result)]
    return {
        "goodput_tok_per_sec": tokens_per_sec(sum(result.num_output_tokens or 0 for result in met), busy_sec),
        "slo_share": len(met) / num_requests,  # a failed request met nothing
    }


def _cost(num_tokens: int, num_good: int, busy_sec: float, prices: Prices) -> dict[str, Any]:
    if prices.price_per_hour is None:
        return {"cost_per_million_tokens": None, "cost_per_request": None}
    cost = prices.price_per_hour * busy_sec / 3600
    return {
        "cost_per_million_tokens": 1e6 * cost / num_tokens if num_tokens else None,
        "cost_per_request": cost / num_good if num_good else None,
    }


def _lengths(values: list[int]) -> dict[str, float | None]:
    return {
        **_percentiles([*values]),
        "max": max(values, default=None),
        "mean": _mean(values),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def acceptance_figures(runs: list[BlockRun], good: list[RequestResult]) -> dict[str, Any] | None:
    """Acceptance by the server's counters where every block has them, else by the requests' own; None without both."""
    by_counter = [run.acceptance for run in runs]
    from_requests = sum_counts([result.acceptance for result in good])
    num_counters = sum(each is not None for each in by_counter)
    if by_counter and num_counters == len(by_counter):
        counts = sum_counts([each for each in by_counter if each is not None])
    else:
        counts = from_requests
    if not counts.num_drafts and not from_requests.num_drafts and not num_counters:
        return None
    # Under a varying K the counters can't tell how often a position was drafted; the requests' own steps can.
    by_position = counts if counts.num_drafted_per_pos or not from_requests.num_drafts else from_requests
    widths = _draft_widths(good, counts)
    num_steps = sum(widths.values())
    return {
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "per_position_rates": by_position.per_position_rates,
        # The counts of a varying K can't tell which drafts went on to a position; the steps can.
        "conditional_rates": _conditional_rates(good) if by_position is from_requests else counts.conditional_rates,
        "num_drafts": counts.num_drafts,
        "num_draft_tokens": counts.num_draft_tokens,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "by_span": _by_span(good),
        "by_output_position": _by_output_position(good),
        "draft_width_histogram": {str(width): count for width, count in sorted(widths.items())},
        "fallback_share": widths[0] / num_steps if num_steps else None,
    }


def sum_counts(counts: list[AcceptanceCounts]) -> AcceptanceCounts:
    """All of them together. Positions are only summed when every part knows them."""
    total = reduce(AcceptanceCounts.__add__, counts, AcceptanceCounts())
    if any(each.num_drafts and not each.num_drafted_per_pos for each in counts):
        total.num_drafted_per_pos, total.num_accepted_per_pos = [], []
    return total


def _conditional_rates(results: list[RequestResult]) -> list[float | None]:
    """By position: accepted there, of the drafts that went so far and were accepted up to it."""
    tries: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for result in results:
        for num_drafted, num_accepted in zip(result.drafted_per_step, result.accepted_per_step, strict=True):
            tries.update(range(min(num_accepted + 1, num_drafted)))
            accepted.update(range(num_accepted))
    width = max((num_drafted for result in results for num_drafted in result.drafted_per_step), default=0)
    return [accepted[i] / tries[i] if tries[i] else None for i in range(width)]


def _draft_widths(results: list[RequestResult], counts: AcceptanceCounts) -> Counter[int]:
    """Steps by number of drafted tokens. A step without a draft is not reported: it is what tokens are left over.

    Empty where the server drafted but its requests do not say how.
    """
    widths: Counter[int] = Counter()
    if counts.num_drafts and not any(result.drafted_per_step for result in results):
        return widths
    for result in results:
        widths.update(result.drafted_per_step)
        widths[0] += max(0, (result.num_output_tokens or 0) - _explained_tokens(result))
    return widths


def _explained_tokens(result: RequestResult) -> int:
    """Output tokens of prompts' own steps, one a stream, and of steps with a draft."""
    return (2 if result.forced_from else 1) + sum(accepted + 1 for accepted in result.accepted_per_step)


def _steps_with_position(results: list[RequestResult]):
    """``(result, output position of the step's first token, drafted, accepted)`` where positions are certain."""
    for result in results:
        if _explained_tokens(result) < (result.num_output_tokens or 0):
            continue  # steps without a draft in between, nobody knows where
        position = 1  # token 0 comes from the prompt's own step
        steps = zip(result.drafted_per_step, result.accepted_per_step, strict=True)
        for step, (num_drafted, num_accepted) in enumerate(steps):
            if [step] == result.forced_from[:1]:
                position = result.forced_from[1] + 1
            yield result, position, num_drafted, num_accepted
            position += num_accepted + 1


def _are_placed(results: list[RequestResult]) -> bool:
    """Whether the steps with a certain position speak for all: requests that draft at every step are the best ones."""
    num_placed = sum(1 for _ in _steps_with_position(results))
    return num_placed >= MIN_PLACED_SHARE * sum(len(result.drafted_per_step) for result in results)


def _by_span(results: list[RequestResult]) -> dict[str, dict[str, Any]]:
    counts: dict[str, AcceptanceCounts] = defaultdict(AcceptanceCounts)
    if not any(result.num_think_tokens for result in results):
        for result in results:
            for num_drafted, num_accepted in zip(result.drafted_per_step, result.accepted_per_step, strict=True):
                counts["answer"].record(num_drafted, num_accepted)
    elif _are_placed(results):
        for result, position, num_drafted, num_accepted in _steps_with_position(results):
            counts["think" if position < result.num_think_tokens else "answer"].record(num_drafted, num_accepted)
    return {name: {"acceptance_length": c.acceptance_length, "num_drafts": c.num_drafts} for name, c in counts.items()}


def _by_output_position(results: list[RequestResult]) -> list[dict[str, Any]]:
    counts: dict[int, AcceptanceCounts] = defaultdict(AcceptanceCounts)
    edges = OUTPUT_BUCKET_TOKENS
    if not _are_placed(results):
        return []
    for _, position, num_drafted, num_accepted in _steps_with_position(results):
        counts[max(edge for edge in edges if edge <= position)].record(num_drafted, num_accepted)
    ends = dict(itertools.pairwise(edges))
    return [
        {
            "start": start,
            "end": ends.get(start),
            "acceptance_length": counts[start].acceptance_length,
            "num_drafts": counts[start].num_drafts,
        }
        for start in sorted(counts)
    ]


def _repeat_spread(records: list[Record]) -> float | None:
    """Median over tasks of how far apart their TPOT lies between repeats."""
    spreads = [relative_spread(values) for values in by_task(records, lambda result: result.tpot_sec).values()]
    return _median([spread for spread in spreads if spread is not None])


def by_task(records: list[Record], value: Callable[[RequestResult], float | None]) -> dict[str, list[float]]:
    """A figure of each repeat by task; requests with an error, and figures that are None or 0, are left out."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        figure = None if record.result.error else value(record.result)
        if figure:
            found[record.key].append(figure)
    return dict(found)


def comparison(baseline: list[BlockRun], other: list[BlockRun]) -> dict[str, Any]:
    """``other`` against ``baseline``, task by task; intervals are a bootstrap over blocks, which share their moment."""
    ours = [record for run in other for record in run.records]
    theirs = [record for run in baseline for record in run.records]
    ratios = _ratios(theirs, ours, lambda result: result.tpot_sec, speedup)
    taus = _ratios(theirs, ours, lambda result: result.acceptance.acceptance_length, lambda a, b: b / a)
    block_of = {record.key: (run.suite, run.block) for run in other for record in run.records}
    interval = bootstrap_ci95(list(ratios.values()), clusters=[block_of[key] for key in ratios])
    mean_tau = statistics.fmean  # of ratios near one another; a median would hide a loss in few of the tasks
    tau_interval = bootstrap_ci95(list(taus.values()), statistic=mean_tau)  # acceptance knows no moment
    rates = []
    for runs in (baseline, other):
        tokens = sum(r.result.num_output_tokens or 0 for run in runs for r in run.records if not r.result.error)
        rates.append(tokens_per_sec(tokens, sum(run.busy_sec for run in runs)))
    return {
        "num_pairs": len(ratios),
        "speedup_median": _median(list(ratios.values())),
        "speedup_ci95": list(interval) if interval else None,
        "speedup_by_task": ratios,
        "throughput_ratio": rates[1] / rates[0] if rates[0] and rates[1] else None,
        "acceptance_ratio_mean": mean_tau(taus.values()) if taus else None,
        "acceptance_ratio_ci95": list(tau_interval) if tau_interval else None,
    }


def _ratios(
    baseline: list[Record],
    other: list[Record],
    value: Callable[[RequestResult], float | None],
    ratio: Callable[[float, float], float],
) -> dict[str, float]:
    """By task that both arms answered: the ratio of the medians over repeats."""
    first, second = by_task(baseline, value), by_task(other, value)
    return {
        key: ratio(statistics.median(first[key]), statistics.median(second[key]))
        for key in sorted(first.keys() & second.keys())
    }
