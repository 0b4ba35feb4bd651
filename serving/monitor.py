"""What a server's steps say about speculation, counted so that it stays right while K changes. Pure Python.

Rates are over the drafts that could have been accepted there: per position, accepted / drafted at i; conditional,
accepted / reached (drafted at i and accepted before it). The usual accepted / drafts is too low as soon as some drafts
are shorter. Recent figures decay with the drafts (acceptance) or with decode time (goodput); totals do not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from serving.draft_rates import DraftRates
from serving.drift import DriftDetector

RECENT_DRAFTS = 256.0  # drafts that the recent acceptance counts
RECENT_SEC = 5.0  # decode seconds that the recent goodput counts
POSITION_EDGES = (0, 256, 1024, 4096, 16384)  # output positions at which a new bucket begins
SPANS = ("think", "answer")
HISTORY_SEC = 1.0
MAX_HISTORY, MAX_EVENTS = 600, 100


class Draft(NamedTuple):
    """One sequence's verification."""

    num_drafted: int
    num_accepted: int
    bucket: int  # of POSITION_EDGES
    span: str


def position_bucket(output_position: int) -> int:
    """The index of the bucket that holds ``output_position``."""
    return bisect_right(POSITION_EDGES, output_position) - 1


class Monitor:
    """Counts what it is told of drafts and decode steps. ``trained_rates``: conditional acceptance in training."""

    def __init__(self, max_draft_tokens: int, trained_rates: Sequence[float] = ()) -> None:
        self.recent = DraftRates(max_draft_tokens, RECENT_DRAFTS)
        self.total = DraftRates(max_draft_tokens)
        self.by_span = {span: DraftRates(max_draft_tokens) for span in SPANS}
        self.by_position = [DraftRates(max_draft_tokens) for _ in POSITION_EDGES]
        self.k_histogram: Counter[int] = Counter()
        self.num_output_tokens = self.num_sequence_steps = 0
        self.decode_sec = self.fallback_sec = 0.0
        self.batch = 0
        self.max_draft_tokens = max_draft_tokens
        self.drift = DriftDetector(trained_rates[:max_draft_tokens])
        self.history: deque[dict[str, Any]] = deque(maxlen=MAX_HISTORY)
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._recent_tokens = self._recent_sec = self._recent_sequences = 0.0
        self._recent_plain_tokens = self._recent_plain_sec = 0.0  # of steps whose plain speed is known
        self._plain_of: dict[int, float | None] = {}  # by batch size, for a second

    def new_head(self, trained_rates: Sequence[float]) -> None:
        """Another head drafts from now on: recent acceptance and drift begin anew, totals go on."""
        self.recent = DraftRates(self.max_draft_tokens, RECENT_DRAFTS)
        self.drift = DriftDetector(trained_rates[: self.max_draft_tokens])

    def observe_drafts(self, draft: Draft, count: int, at_sec: float) -> None:
        """``count`` sequences' verifications of one kind."""
        rates = self.recent, self.total, self.by_span[draft.span], self.by_position[draft.bucket]
        for each in rates:
            each.record(draft.num_drafted, draft.num_accepted, count)
        if self.drift.observe(draft.num_drafted, draft.num_accepted, count):
            self.event(at_sec, "alarm", self.drift.reason or "acceptance is back to what training measured")

    def observe_step(
        self,
        batch: int,
        num_draft_tokens: int,
        seconds: float,
        num_tokens: int,
        at_sec: float,
        plain: Callable[[int], float | None],
    ) -> None:
        """A step that only decoded; ``plain``: tokens per second that plain decode would give a batch, None: unknown.

        Asked once a second for each batch size, for that is an estimate of some microseconds.
        """
        self.k_histogram[num_draft_tokens] += 1
        self.num_output_tokens += num_tokens
        self.num_sequence_steps += batch
        self.decode_sec += seconds
        self.fallback_sec += seconds if num_draft_tokens == 0 else 0.0
        self.batch = batch
        keep = max(0.0, 1 - seconds / RECENT_SEC)
        self._recent_tokens = keep * self._recent_tokens + num_tokens
        self._recent_sec = keep * self._recent_sec + seconds
        self._recent_sequences = keep * self._recent_sequences + batch
        is_new_point = not self.history or at_sec - self.history[-1]["at_sec"] >= HISTORY_SEC
        if is_new_point:
            self._plain_of.clear()
        if batch not in self._plain_of:
            self._plain_of[batch] = plain(batch)
        speed = self._plain_of[batch]
        self._recent_plain_tokens = keep * self._recent_plain_tokens + (num_tokens if speed else 0)
        self._recent_plain_sec = keep * self._recent_plain_sec + (num_tokens / speed if speed else 0.0)
        if is_new_point:
            point = {
                "at_sec": at_sec,
                "num_speculative_tokens": num_draft_tokens,
                "goodput_tok_per_sec": self.goodput_tok_per_sec,
                "plain_tok_per_sec": self.plain_tok_per_sec,
                "acceptance_length": self.recent.acceptance_length,
                "batch": batch,
            }
            # Hundreds of them are in each answer.
            self.history.append({key: value and round(value, 3) for key, value in point.items()})

    def event(self, at_sec: float, kind: str, what: str) -> None:
        """Something that people will want to know: kind is policy, head, alarm or failure."""
        self.events.append({"at_sec": round(at_sec, 1), "kind": kind, "what": what})

    @property
    def goodput_tok_per_sec(self) -> float | None:
        """Output tokens of all sequences per second of decode time."""
        return self._recent_tokens / self._recent_sec if self._recent_sec else None

    @property
    def plain_tok_per_sec(self) -> float | None:
        """What plain decode would give for the same tokens in batches as large as theirs were."""
        if self.max_draft_tokens == 0:
            return self.goodput_tok_per_sec
        return self._recent_plain_tokens / self._recent_plain_sec if self._recent_plain_sec else None

    @property
    def tokens_per_step(self) -> float | None:
        """Of one sequence; unlike τ, steps without a draft count."""
        return self._recent_tokens / self._recent_sequences if self._recent_sequences else None

    def status(self) -> dict[str, Any]:
        """The figures, ready for JSON; what is not known is None."""
        return {
            "acceptance_length": self.recent.acceptance_length,
            "per_position_rates": self.recent.per_position_rates,
            "conditional_rates": self.recent.conditional_rates,
            "tokens_per_step": self.tokens_per_step,
            "goodput_tok_per_sec": self.goodput_tok_per_sec,
            "plain_tok_per_sec": self.plain_tok_per_sec,
            "fallback_share": self.fallback_sec / self.decode_sec if self.decode_sec else None,
            "alarm": "drift" if self.drift.is_on else None,
            "batch": self.batch,
            "k_histogram": {str(k): count for k, count in sorted(self.k_histogram.items())},
            "totals": {
                "num_steps": self.k_histogram.total(),
                "num_drafts": round(self.total.num_drafts),
                "num_draft_tokens": round(sum(self.total.drafted)),
                "num_accepted_tokens": round(self.total.num_accepted),
                "num_output_tokens": self.num_output_tokens,
                "num_sequence_steps": self.num_sequence_steps,
                "drafted_per_position": [round(count) for count in self.total.drafted],
                "reached_per_position": [round(count) for count in self.total.reached],
                "accepted_per_position": [round(count) for count in self.total.accepted],
                "decode_sec": self.decode_sec,
                "fallback_sec": self.fallback_sec,
            },
            "by_span": {span: _summary(rates) for span, rates in self.by_span.items()},
            "by_output_position": [
                {"from": begin, "to": end, **_summary(rates)}
                for begin, end, rates in zip(POSITION_EDGES, (*POSITION_EDGES[1:], None), self.by_position, strict=True)
            ],
            "history": list(self.history),
            "events": list(self.events),
        }


def _summary(rates: DraftRates) -> dict[str, Any]:
    return {
        "num_drafts": round(rates.num_drafts),
        "num_draft_tokens": round(sum(rates.drafted)),
        "num_accepted_tokens": round(rates.num_accepted),
        "acceptance_length": rates.acceptance_length,
        "per_position_rates": rates.per_position_rates,
        "conditional_rates": rates.conditional_rates,
    }


class SpanTracker:
    """Whether a request is thinking or answering, told from its tokens as they come."""

    def __init__(self, think_start: Sequence[int] = (), think_end: Sequence[int] = ()) -> None:
        self.think_start, self.think_end = list(think_start), list(think_end)
        self._last_tokens = {*self.think_start[-1:], *self.think_end[-1:]}  # without one of them no tag ends
        self._seen: dict[str, tuple[int, str]] = {}  # request -> output tokens read, span

    def span(self, request_id: str, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> str:
        """``think`` from ``<think>`` on (in the output, or last in the prompt) until ``</think>``, else ``answer``."""
        if not self.think_end:
            return "answer"
        if request_id not in self._seen:
            tail = list(prompt_ids[-len(self.think_start) - 4 :])  # a line break may follow the tag
            thinking = last_index(tail, self.think_start) > last_index(tail, self.think_end)
            self._seen[request_id] = 0, "think" if thinking else "answer"
        read, span = self._seen[request_id]
        if not self._last_tokens.isdisjoint(output_ids[read:]):
            overlap = max(len(self.think_start), len(self.think_end)) - 1
            news = output_ids[max(0, read - overlap) :]
            start, end = last_index(news, self.think_start), last_index(news, self.think_end)
            if start != end:
                span = "think" if start > end else "answer"
        self._seen[request_id] = len(output_ids), span
        return span

    @property
    def known(self) -> list[str]:
        """Requests that it holds something of."""
        return list(self._seen)

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests have ended."""
        for request_id in request_ids:
            self._seen.pop(request_id, None)


def last_index(tokens: Sequence[int], pattern: Sequence[int]) -> int:
    """Where ``pattern`` begins for the last time in ``tokens``; -1: nowhere."""
    width = len(pattern)
    for begin in range(len(tokens) - width, -1, -1):
        if width and list(tokens[begin : begin + width]) == list(pattern):
            return begin
    return -1
