"""The engine's status as Prometheus metrics, on vLLM's own ``/metrics``.

A scrape asks the engine first, so its figures are of now, and nothing runs between scrapes. While the engine does not
answer, the last figures stay and ``specdec:status_age_seconds`` tells their age.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.engine_status import EngineStatus, EngineUnavailableError

MODES = ("speculating", "plain", "fixed", "off", "safe")
FRESH_SEC = 1.0  # scrapes that are closer together share an answer
SCRAPE_WAIT_SEC = 2.0  # well within Prometheus' own limit of 10 s a scrape

Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric: how to read it from a status. Positions count from 0, as vLLM's do."""

    name: str
    help: str
    read: Callable[[Status], Any]
    label: str | None = None
    counter: bool = False

    def family(self, status: Status) -> Metric:
        """The metric with its samples; what is null or not a number has none."""
        kind = CounterMetricFamily if self.counter else GaugeMetricFamily
        family = kind(f"specdec:{self.name}", self.help, labels=[self.label] if self.label else [])
        for labels, number in self._samples(status):
            if isinstance(number, int | float):
                family.add_metric(labels, float(number))
        return family

    def _samples(self, status: Status) -> Iterable[tuple[list[str], Any]]:
        read = self.read(status)
        if self.label is None:
            return [([], read)]
        if isinstance(read, list):
            return [([str(i)], number) for i, number in enumerate(read)]
        return [([value], number) for value, number in read.items()] if isinstance(read, Mapping) else []


def _at(*keys: str) -> Callable[[Status], Any]:
    def read(status: Status) -> Any:
        found: Any = status
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read


def _by_span(key: str) -> Callable[[Status], dict[str, Any]]:
    def read(status: Status) -> dict[str, Any]:
        spans = status.get("by_span")
        return {span: _at(span, key)(spans) for span in spans} if isinstance(spans, Mapping) else {}

    return read


def _by_output_position(key: str) -> Callable[[Status], dict[str, Any]]:
    """By the first output position of each bucket."""

    def read(status: Status) -> dict[str, Any]:
        buckets = status.get("by_output_position")
        found = buckets if isinstance(buckets, list) else []
        return {
            str(bucket["from"]): bucket.get(key) for bucket in found if isinstance(bucket, Mapping) and "from" in bucket
        }

    return read


GAUGES = (
    Figure("num_speculative_tokens", "K: tokens drafted a step, now.", _at("num_speculative_tokens")),
    Figure("max_speculative_tokens", "The largest K.", _at("max_speculative_tokens")),
    Figure("acceptance_length", "Tokens a draft gains, bonus token included; recent.", _at("acceptance_length")),
    Figure(
        "tokens_per_step", "Tokens a sequence gains in a step, with or without a draft; recent.", _at("tokens_per_step")
    ),
    Figure("trained_acceptance_length", "The same as training measured it.", _at("trained", "acceptance_length")),
    Figure("conditional_rate", "Accepted at a position / reached; recent.", _at("conditional_rates"), "position"),
    Figure(
        "trained_conditional_rate", "The same as training measured it.", _at("trained", "conditional_rates"), "position"
    ),
    Figure(
        "goodput_tok_per_sec", "Output tokens per second of engine decode time; recent.", _at("goodput_tok_per_sec")
    ),
    Figure(
        "plain_tok_per_sec",
        "What plain decode would give for the same tokens at the same batch sizes; recent.",
        _at("plain_tok_per_sec"),
    ),
    Figure("fallback_share", "Share of decode time spent at K = 0, since the start.", _at("fallback_share")),
    Figure("batch", "Sequences in the last step.", _at("batch")),
    Figure("alarm", "1 while an alarm is on.", lambda status: int(status.get("alarm") is not None)),
    Figure("mode", "1 for the present mode.", lambda status: {m: int(m == status.get("mode")) for m in MODES}, "mode"),
)
COUNTERS = (
    Figure("steps", "Decode steps by K.", _at("k_histogram"), "k", counter=True),
    Figure("drafts", "Drafts verified whole.", _at("totals", "num_drafts"), counter=True),
    Figure("sequence_steps", "Sequences of decode steps.", _at("totals", "num_sequence_steps"), counter=True),
    Figure("output_tokens", "Output tokens of decode steps.", _at("totals", "num_output_tokens"), counter=True),
    Figure(
        "drafted_tokens", "Tokens drafted at a position.", _at("totals", "drafted_per_position"), "position",
        counter=True,
    ),
    Figure(
        "reached_tokens", "Tokens drafted at a position, all before them accepted.",
        _at("totals", "reached_per_position"), "position", counter=True,
    ),
    Figure(
        "accepted_tokens", "Tokens accepted at a position.", _at("totals", "accepted_per_position"), "position",
        counter=True,
    ),
    Figure("decode_seconds", "Engine time in decode steps.", _at("totals", "decode_sec"), counter=True),
    Figure("fallback_seconds", "The part of it at K = 0.", _at("totals", "fallback_sec"), counter=True),
    Figure("policy_failures", "Exceptions in the policy.", _at("totals", "policy_failures"), counter=True),
    Figure("span_drafts", "Drafts by span of the output.", _by_span("num_drafts"), "span", counter=True),
    Figure("span_draft_tokens", "Tokens drafted by span.", _by_span("num_draft_tokens"), "span", counter=True),
    Figure("span_accepted_tokens", "Tokens accepted by span.", _by_span("num_accepted_tokens"), "span", counter=True),
    Figure(
        "position_drafts", "Drafts by output position, from this one on.", _by_output_position("num_drafts"),
        "output_position", counter=True,
    ),
    Figure(
        "position_accepted_tokens", "Tokens accepted by output position.", _by_output_position("num_accepted_tokens"),
        "output_position", counter=True,
    ),
)  # fmt: skip


class StatusCollector:
    """What prometheus_client calls on each scrape, in whatever thread: reads the latest status, waits for nothing."""

    def __init__(self, engine: EngineStatus) -> None:
        self.engine = engine

    def describe(self) -> Iterator[Metric]:
        """The metrics without samples, so that a name that is taken is noticed at once."""
        return self._families({})

    def collect(self) -> Iterator[Metric]:
        """The latest status; nothing before the first."""
        status = self.engine.latest
        return iter(()) if status is None else self._families(status)

    def _families(self, status: Status) -> Iterator[Metric]:
        age = Figure("status_age_seconds", "Since the engine last answered.", lambda _: self.engine.age_sec)
        return (figure.family(status) for figure in (*GAUGES, *COUNTERS, age))


class FreshMetrics:
    """Middleware: before a scrape of ``/metrics`` goes on, the engine is asked for its status."""

    def __init__(self, app: ASGIApp, engine: Callable[[], EngineStatus | None]) -> None:
        self.app, self.engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) == "/metrics":
            engine = self.engine()
            if engine is not None:
                # Without an answer vLLM's own metrics still go out, and ours with their age.
                with contextlib.suppress(EngineUnavailableError):
                    await engine.status(max_age_sec=FRESH_SEC, timeout_sec=SCRAPE_WAIT_SEC)
        await self.app(scope, receive, send)
