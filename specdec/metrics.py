"""Every formula of the project, once. Counts are carried; division comes last.

=====================  =============================================================================
acceptance length τ    ``1 + num_accepted_tokens / num_drafts``: includes the bonus token
acceptance rate α      accepted / drafted tokens, a fraction
per-position rate i    accepted at i / **drafted at i** (right also when K varies)
conditional rate i     accepted at i / drafts of width > i that were accepted through i - 1
TPOT                   ``(e2e - ttft) / (output tokens - 1)``, tokens from usage, never from chunks
speed-up               plain TPOT / speculative TPOT: same prompts, same run
=====================  =============================================================================

Zero drafts give None, not 0 or 1.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

OUTPUT_BUCKET_TOKENS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # where along an output


@dataclass(kw_only=True, slots=True)
class AcceptanceCounts:
    """Counters of propose-and-verify rounds; ``a - b`` gives a window, ``a + b`` a union."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_drafted_per_pos: list[int] = field(default_factory=list)
    num_accepted_per_pos: list[int] = field(default_factory=list)

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Add one draft of ``num_drafted`` tokens of which the first ``num_accepted`` were accepted."""
        if not 0 <= num_accepted <= num_drafted:
            raise ValueError(f"{num_accepted} accepted of {num_drafted} drafted tokens")
        missing = num_drafted - len(self.num_drafted_per_pos)
        self.num_drafted_per_pos += [0] * missing
        self.num_accepted_per_pos += [0] * missing
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for i in range(num_drafted):
            self.num_drafted_per_pos[i] += 1
            self.num_accepted_per_pos[i] += i < num_accepted

    def _combine(self, other: AcceptanceCounts, sign: int) -> AcceptanceCounts:
        def vector(a: list[int], b: list[int]) -> list[int]:
            width = max(len(a), len(b))
            return [x + sign * y for x, y in zip(a + [0] * (width - len(a)), b + [0] * (width - len(b)), strict=True)]

        return AcceptanceCounts(
            num_drafts=self.num_drafts + sign * other.num_drafts,
            num_draft_tokens=self.num_draft_tokens + sign * other.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + sign * other.num_accepted_tokens,
            num_drafted_per_pos=vector(self.num_drafted_per_pos, other.num_drafted_per_pos),
            num_accepted_per_pos=vector(self.num_accepted_per_pos, other.num_accepted_per_pos),
        )

    def __add__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        return self._combine(other, 1)

    def __sub__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        return self._combine(other, -1)

    @property
    def acceptance_length(self) -> float | None:
        """τ in [1, K + 1]: tokens gained by one verification, the bonus token included."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """α in [0, 1]: accepted share of the drafted tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def per_position_rates(self) -> list[float | None]:
        """Accepted at i / drafted at i."""
        return [
            accepted / drafted if drafted else None
            for accepted, drafted in zip(self.num_accepted_per_pos, self.num_drafted_per_pos, strict=True)
        ]

    @property
    def conditional_rates(self) -> list[float | None]:
        """Accepted at i among the drafts that were accepted through i - 1 (exact under one fixed K)."""
        reached = [self.num_drafts, *self.num_accepted_per_pos[:-1]]
        return [
            accepted / tries if tries else None
            for accepted, tries in zip(self.num_accepted_per_pos, reached, strict=False)
        ]


def tpot_sec(e2e_sec: float, ttft_sec: float, num_output_tokens: int) -> float | None:
    """Seconds per output token after the first; None when there is no second token."""
    return (e2e_sec - ttft_sec) / (num_output_tokens - 1) if num_output_tokens > 1 else None


def speedup(plain_tpot_sec: float, spec_tpot_sec: float) -> float:
    """Plain over speculative: above 1, speculation pays."""
    return plain_tpot_sec / spec_tpot_sec


def bootstrap_ci95(
    values: Sequence[float],
    statistic=statistics.median,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of ``statistic``; None for fewer than two values.

    With ``clusters``, one for each value, whole clusters are drawn: values that were measured together share what the
    machine did then, and counting them as independent would make the interval too narrow. None for fewer than three.
    """
    groups: list[list[float]] = [[value] for value in values]
    if clusters is not None:
        together: dict[Hashable, list[float]] = defaultdict(list)
        for value, cluster in zip(values, clusters, strict=True):
            together[cluster].append(value)
        groups = list(together.values())
    if len(groups) < (2 if clusters is None else 3):
        return None
    rng = random.Random(seed)
    draws = sorted(
        statistic([value for group in rng.choices(groups, k=len(groups)) for value in group]) for _ in range(resamples)
    )
    return draws[int(0.025 * resamples)], draws[int(0.975 * resamples) - 1]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear-interpolation percentile, ``percent`` in [0, 100]; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two outputs differ (also where one ends early); None when identical."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def tokens_per_sec(num_tokens: int, busy_sec: float) -> float | None:
    """Output tokens per second of the time in which requests were in flight; None without such time."""
    return num_tokens / busy_sec if busy_sec > 0 else None


def relative_spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median of repeated measurements of one thing; None for fewer than two."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None
