"""What speculation can gain: its price is a longer step, its yield is τ tokens instead of one.

=====================  ====================================================================
plain step             seconds a token of the baseline (TPOT p50: one step, one token)
spec step              seconds a step of the arm (median gap between its chunks)
drafting share d       of the arm's steps, those that verify a draft; the others yield one token
predicted speed-up     ``(1 + d (τ - 1)) * plain step / spec step``
ceiling                ``(1 + d K) * plain step / spec step``: every drafted token accepted
break-even             ``spec step / plain step`` tokens a step: below it speculation loses
=====================  ====================================================================
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STOP_ABOVE = "above this concurrency, stop"
NEVER_SLOWER = "never slower in the measured range"
ALWAYS_SLOWER = "slower everywhere"
NOT_MONOTONE = "slower at some concurrencies, but not at the highest: no single break-even"

BANDWIDTH_BYTES = 256 * 2**20  # far more than the caches hold
BANDWIDTH_ROUNDS = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cost_points(
    result_cells: Sequence[Mapping[str, Any]],
    arms: Sequence[Mapping[str, Any]],
    bandwidth_bound_step_sec: float | None = None,
) -> list[dict[str, Any]]:
    """One point for each cell and speculating arm.

    Args:
        result_cells: ``cells`` of the result tree.
        arms: ``arms`` of the result tree.
        bandwidth_bound_step_sec: the least a plain step can take here (see ``memory_bound``), if known.

    Returns:
        Times in seconds, ratios plain; what was not measured is None. Empty where the baseline itself speculates:
        its steps are then no plain ones.
    """
    baselines = [arm for arm in arms if arm["baseline"]]
    if len(baselines) != 1 or baselines[0]["num_speculative_tokens"]:
        return []
    points = []
    for cell in result_cells:
        plain = cell["arms"].get(baselines[0]["name"]) or {}
        for arm in arms:
            figures = cell["arms"].get(arm["name"])
            if arm["baseline"] or not figures or not _speculates(arm, figures):
                continue
            points.append(
                {
                    "arm": arm["name"], "cell": cell["name"], "cell_group": _cell_group(cell),
                    **{name: cell[name] for name in ("concurrency", "max_new_tokens", "temperature")},
                    **_model(arm, plain, figures),
                    "measured_speedup": ((cell.get("comparisons") or {}).get(arm["name"]) or {}).get("speedup_median"),
                    "bandwidth_bound_step_sec": bandwidth_bound_step_sec,
                    "synthetic": bool(arm["synthetic"]),
                }
            )  # fmt: skip
    return points


def _speculates(arm: Mapping[str, Any], figures: Mapping[str, Any]) -> bool:
    """A second plain arm (an A/A run) has no steps to model."""
    return bool(arm["num_speculative_tokens"]) or figures.get("acceptance") is not None


def _model(arm: Mapping[str, Any], plain: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    width = arm["num_speculative_tokens"]
    plain_step = (plain.get("tpot_sec") or {}).get("p50")
    spec_step = figures.get("step_sec_p50")
    acceptance = figures.get("acceptance") or {}
    tau, drafting = acceptance.get("acceptance_length"), 1 - (acceptance.get("fallback_share") or 0.0)
    ratio = plain_step / spec_step if plain_step and spec_step else None
    return {
        "num_speculative_tokens": width,
        "acceptance_length": tau,
        "plain_step_sec": plain_step,
        "spec_step_sec": spec_step,
        "predicted_speedup": (1 + drafting * (tau - 1)) * ratio if ratio and tau else None,
        "ceiling_speedup": (1 + drafting * width) * ratio if ratio and width else None,
        "break_even_acceptance_length": 1 / ratio if ratio else None,
    }


def _cell_group(cell: Mapping[str, Any]) -> str:
    """The condition without its concurrency, as a label."""
    temperature = cell["temperature"]
    sampling = "greedy" if temperature == 0 else "sampled" if temperature is None else f"T={temperature:g}"
    parts = [sampling, f"{cell['max_new_tokens']} tokens"]
    if cell.get("thinking_budget") is not None:
        parts.append(f"{cell['thinking_budget']} of thinking")
    if (cell.get("num_samples") or 1) > 1:
        parts.append(f"{cell['num_samples']} samples")
    if cell.get("arrival", "closed") != "closed":
        parts.append(f"{cell['arrival']} at {cell['rate']:g}/s" if cell.get("rate") else cell["arrival"])
    return ", ".join(parts)


def break_even(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the measured speed-up of an arm falls below 1 as concurrency grows.

    Points belong together when they differ in nothing but concurrency; fewer than two concurrencies show no trend
    and give no row. The crossing is interpolated between neighbours in the logarithms of both.

    Returns:
        Rows with ``concurrency`` (None where there is no crossing) and ``verdict`` in words.
    """
    groups: dict[tuple[str, str], dict[int, float]] = {}
    for point in points:
        if point["measured_speedup"] is not None:
            speedups = groups.setdefault((point["arm"], point["cell_group"]), {})
            speedups[point["concurrency"]] = point["measured_speedup"]
    rows = []
    for (arm, cell_group), speedups in groups.items():
        if len(speedups) > 1:
            concurrency, verdict = _crossing(sorted(speedups.items()))
            rows.append({"arm": arm, "cell_group": cell_group, "concurrency": concurrency, "verdict": verdict})
    return rows


def _crossing(speedups: Sequence[tuple[int, float]]) -> tuple[float | None, str]:
    slower = [value < 1 for _, value in speedups]
    if not any(slower):
        return None, NEVER_SLOWER
    if all(slower):
        return None, ALWAYS_SLOWER
    if not slower[-1]:
        return None, NOT_MONOTONE
    # The last crossing: above it every measured concurrency is slower.
    last = max(i for i, is_slower in enumerate(slower) if not is_slower)
    (low, above), (high, below) = speedups[last], speedups[last + 1]
    share = math.log(above) / math.log(above / below)
    return low * (high / low) ** share, STOP_ABOVE


def memory_bound(
    weight_bytes: float, kv_bytes_per_token: float, context_tokens: float, bandwidth_bytes_per_sec: float
) -> float:
    """Seconds that a decode step takes at least: it reads all weights and the cache of every token in context.

    Args:
        weight_bytes: read by one step (of a mixture of experts: those in use).
        kv_bytes_per_token: bytes of keys and values that one token left in all layers.
        context_tokens: tokens in context, summed over the requests of the batch.
        bandwidth_bytes_per_sec: of the memory that holds them.

    Raises:
        ValueError: the bandwidth is not positive.
    """
    if bandwidth_bytes_per_sec <= 0:
        raise ValueError(f"the bandwidth must be positive, not {bandwidth_bytes_per_sec} bytes/s")
    return (weight_bytes + kv_bytes_per_token * context_tokens) / bandwidth_bytes_per_sec


def weight_bytes_of(directory: Path, stored_dtype: str, dtype: str) -> int:
    """Bytes of the safetensors in ``directory`` once they are held in ``dtype``."""
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return stored * DTYPE_BYTES.get(dtype, 4) // DTYPE_BYTES.get(stored_dtype, 2)


def measure_bandwidth(num_bytes: int = BANDWIDTH_BYTES) -> float:
    """Bytes per second that this machine's cores together read from memory, in a test of under a second.

    Each core reduces its own part of a buffer; the best round counts, because other work can only slow it down.
    """
    import numpy as np

    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Written once, so that every page exists: reading untouched memory would read one shared page of zeros.
    parts = np.array_split(np.ones(num_bytes // 4, dtype=np.float32), num_threads)
    best = math.inf
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(BANDWIDTH_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # a maximum is vectorised and lets go of the interpreter lock
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best
