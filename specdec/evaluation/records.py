"""What a measurement consists of: conditions, requests, blocks. Everything here goes through JSON unchanged.

A *cell* is one condition (sampling, load, token budget). In a cell, a *block* of tasks goes through each arm in
turn; what one arm gave for one block is a ``BlockRun``, the unit that is journalled, resumed and summed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from specdec import metrics
from specdec.metrics import AcceptanceCounts

# The kinds of RequestResult.error, in the order a reader meets them.
ERROR_KINDS = (
    "http_429", "http_4xx", "http_5xx", "stream_error", "timeout", "disconnected", "truncated", "malformed",
    "missing_usage", "not_sent",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One condition under which every task is measured on every arm."""

    name: str  # unique in a run, e.g. "greedy", "sampled c4"
    temperature: float | None  # 0: greedy; None: the server's default sampling
    concurrency: int = 1  # closed loop: requests in flight; open loop: the most at once
    arrival: str = "closed"  # closed | poisson | gamma:SHAPE | trace:FILE
    rate: float | None = None  # requests per second of an open loop
    max_new_tokens: int = 128
    thinking_budget: int | None = None  # thinking tokens after which the think tag is closed by force
    num_samples: int = 1
    repeats: int = 1

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(kw_only=True, slots=True)
class RequestResult:
    """What one request gave. Times are seconds since it was sent; tokens are the server's own count (usage)."""

    error: str | None = None  # one of ERROR_KINDS
    error_detail: str | None = None
    ttft_sec: float | None = None
    ttfvt_sec: float | None = None  # first visible token: after the thinking, or the first when there is none
    e2e_sec: float | None = None  # to the chunk that carried the last token
    chunk_gaps_sec: list[float] = field(default_factory=list)  # a chunk may hold several tokens
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_think_tokens: int = 0  # up to and including </think>; all of an output that never closes it
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # empty when the server does not return them
    text: str = ""  # reasoning and answer as streamed, the think tags included
    finish_reason: str | None = None
    # One entry a verification, as the server reports them; empty: it did not speculate, or does not say.
    drafted_per_step: list[int] = field(default_factory=list)
    accepted_per_step: list[int] = field(default_factory=list)
    forced_from: list[int] = field(default_factory=list)  # step and token that a second stream begins with, if any
    closing_token_ids: list[int] = field(default_factory=list)  # that the client put in front of it, no output
    clock_jump_sec: float = 0.0  # how far the wall clock moved against the monotonic one that times are taken from

    @property
    def tpot_sec(self) -> float | None:
        """Seconds per output token after the first; None after an error or without a second token."""
        if self.error or self.e2e_sec is None or self.ttft_sec is None or self.num_output_tokens is None:
            return None
        return metrics.tpot_sec(self.e2e_sec, self.ttft_sec, self.num_output_tokens)

    def context_ids(self, position: int) -> list[int]:
        """All tokens in front of output token ``position``: the prompt, and what the client added in between."""
        forced = self.forced_from[1] if self.forced_from else len(self.token_ids)
        closing = self.closing_token_ids if position >= forced else []
        return [*self.prompt_token_ids, *self.token_ids[:forced][:position], *closing, *self.token_ids[forced:position]]

    @property
    def acceptance(self) -> AcceptanceCounts:
        """Counts of this request alone."""
        counts = AcceptanceCounts()
        for num_drafted, num_accepted in zip(self.drafted_per_step, self.accepted_per_step, strict=True):
            counts.record(num_drafted, num_accepted)
        return counts


@dataclass(kw_only=True, slots=True)
class Record:
    """One counted request."""

    arm: str
    cell: str
    suite: str
    item_id: str
    repeat: int = 0
    sample: int = 0
    turn: int = 0
    correct: bool | None = None  # None: no gold answer, or the request failed
    answer: str | None = None  # what the checker extracted, for majority votes
    result: RequestResult = field(default_factory=RequestResult)

    @property
    def key(self) -> str:
        """The task, the same on every arm and in every repeat."""
        return f"{self.suite}/{self.item_id}/{self.sample}/{self.turn}"


@dataclass(kw_only=True, slots=True)
class BlockRun:
    """What one arm gave for one block."""

    arm: str
    cell: str
    suite: str
    repeat: int
    block: int
    busy_sec: float  # from the first request sent to the last answer
    records: list[Record]
    acceptance: AcceptanceCounts | None = None  # of the server's counters; None: it exports none
    num_engine_steps: int | None = None
    client_cpu_sec: float = 0.0
    client_lags_sec: list[float] = field(default_factory=list)  # how late its event loop ran, sampled
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for one line of the journal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> BlockRun:
        """The inverse of ``to_dict``.

        Raises:
            TypeError: fields that this version does not know.
        """
        records = [Record(**{**row, "result": RequestResult(**row["result"])}) for row in tree["records"]]
        counts = AcceptanceCounts(**tree["acceptance"]) if tree["acceptance"] else None
        return cls(**{**tree, "records": records, "acceptance": counts})


@dataclass(kw_only=True, slots=True)
class Measurement:
    """All that a run gave; ``interrupted`` means that Ctrl-C cut it short."""

    cells: list[Cell]
    baseline: str  # the arm that the others are compared with
    arms: list[str]
    runs: list[BlockRun] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def of(self, cell: str, arm: str, suite: str | None = None) -> list[BlockRun]:
        """The blocks of one cell and arm, of one suite or of all."""
        return [
            run for run in self.runs if run.cell == cell and run.arm == arm and (suite is None or run.suite == suite)
        ]

    def records(self, cell: str, arm: str, suite: str | None = None) -> list[Record]:
        """Their requests."""
        return [record for run in self.of(cell, arm, suite) for record in run.records]
