"""When requests are sent: a closed loop, random arrivals, or the times of a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from specdec.rows import read_rows

CLOSED = "closed"
USAGE = "arrival is closed, poisson, gamma:SHAPE or trace:FILE"
ROUNDS = 4  # of a fuller closed loop, before the next arm has its turn
TRACE_FIELDS = ("offset_sec", "timestamp", "arrived_at")


def check_arrival(arrival: str, rate: float | None) -> None:
    """Refuse an arrival process that can't be drawn.

    Raises:
        ValueError: unknown process, a shape or rate that isn't positive, a rate that is missing or useless.
    """
    kind, _, argument = arrival.partition(":")
    if kind == CLOSED:
        if rate is not None:
            raise ValueError("a closed loop sends when an answer is done: drop --rate, or add --arrival poisson")
        return
    if kind == "trace":
        trace_offsets(Path(argument))
        return
    if kind not in ("poisson", "gamma") or (kind == "poisson" and argument):
        raise ValueError(f"unknown arrival {arrival!r}: {USAGE}")
    if kind == "gamma":
        gamma_shape(arrival)
    if rate is None or not math.isfinite(rate) or rate <= 0:
        raise ValueError(f"--arrival {arrival} needs --rate, in requests per second, above 0")


def gamma_shape(arrival: str) -> float:
    """Shape of the gaps between requests: 1 is Poisson, less is burstier.

    Raises:
        ValueError: not a positive number.
    """
    text = arrival.partition(":")[2]
    try:
        shape = float(text)
    except ValueError:
        shape = 0.0
    if not math.isfinite(shape) or shape <= 0:
        raise ValueError(f"gamma wants a positive shape such as gamma:0.5 (below 1: bursts), got {text!r}")
    return shape


def trace_offsets(path: Path) -> list[float]:
    """Seconds from the first request of a trace to each of its requests, ascending.

    ``path`` is JSONL with ``offset_sec``, ``timestamp`` or ``arrived_at`` (seconds), or text with a number a line.

    Raises:
        ValueError: no such file, or a line without a time.
    """
    if not path.is_file():
        raise ValueError(f"the arrival trace {path} does not exist")
    times = []
    if path.suffix == ".jsonl":
        for where, item in read_rows(path):
            times.append(_seconds(next((item[name] for name in TRACE_FIELDS if name in item), None), where))
    else:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                times.append(_seconds(line, f"{path} line {number}"))
    if not times:
        raise ValueError(f"the arrival trace {path} is empty")
    times.sort()
    return [time - times[0] for time in times]


def _seconds(value: object, where: str) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
        if math.isfinite(seconds):
            return seconds
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{where}: no time; want seconds in one of {', '.join(TRACE_FIELDS)}")


def offsets(arrival: str, rate: float | None, count: int, seed: str) -> list[float] | None:
    """Seconds at which ``count`` requests are sent, the first at 0; None for a closed loop.

    Gaps are gamma distributed with mean ``1 / rate``; a trace that is too short starts again behind its end, with
    ``rate`` it is stretched to that mean rate.
    """
    kind = arrival.partition(":")[0]
    if kind == CLOSED:
        return None
    if kind == "trace":
        return _replay(trace_offsets(Path(arrival.partition(":")[2])), rate, count)
    assert rate is not None
    shape = gamma_shape(arrival) if kind == "gamma" else 1.0
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + rng.gammavariate(shape, 1 / (rate * shape)))
    return times[:count]


def _replay(trace: Sequence[float], rate: float | None, count: int) -> list[float]:
    mean_gap = trace[-1] / (len(trace) - 1) if len(trace) > 1 else 0.0
    scale = 1 / (rate * mean_gap) if rate and mean_gap else 1.0
    period = trace[-1] + mean_gap
    return [scale * (trace[i % len(trace)] + period * (i // len(trace))) for i in range(count)]


def block_size(arrival: str, concurrency: int, num_tasks: int) -> int:
    """Tasks that go to one arm before the next has its turn.

    As few as the load allows, for drift then hits all arms alike: one at concurrency 1, a few rounds of a fuller
    closed loop (its ends are less loaded), everything of an open loop.
    """
    if arrival != CLOSED:
        return num_tasks
    return 1 if concurrency == 1 else min(num_tasks, ROUNDS * concurrency)
