"""What the policy knows of step times, from steps of the recent past. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

DRAFTING = 1.05  # a step that drafts takes so much longer, at least: a head runs one layer, its target some thirty
BORROWED = 2  # steps that a time counts for that is of another kind of batch
FIRST_NOISE = 0.1  # standard deviation of the log of a step's time from one step to the next,
LEAST_NOISE, NOISE_GAIN = 0.002, 0.02  # at least, and how fast it is learned
DRIFT, OWN_DRIFT = 0.2, 3e-5  # variance that a step adds, in that of the noise: the machine's speed, and what a K takes
MOST_DRIFT = 25.0  # of the machine's speed, after however many steps
ODD = 3.0  # standard deviations by which a step is out of proportion
MOVED_DOUBT = 0.1  # of how the K compare, for the log by which the machine's speed has changed since
LENT_DOUBT = 0.04  # standard deviation of how the K compare for a batch of another kind, or of made-up requests,
KEPT_DOUBT = 0.015  # or for another server,
LENT_LEVEL = 0.5  # and of how long they all take
UNKNOWN_UNCERTAINTY = 0.3  # of a K that was never timed with a batch of this kind
NOT_FULL = 0.1  # standard deviation of the log of a step of a batch that is not full beside what it is taken for
UNKNOWN_GROWTH = 0.6  # of a step's time, what grows with the batch


class _Size:
    """One batch size: the log of each K's seconds, and the machine's slowness, which all of them share.

    A Kalman filter. Its state: slowness, by how much more batches that are not full take than they were taken for, then
    each K in the order in which they were first timed. The covariance is in units of the variance of the noise, which
    is what a single step is off: how well a K is known depends on it.
    """

    def __init__(self, noise: float) -> None:
        self.place: dict[int, int] = {}  # of K in the state
        self.state, self.covariance = [0.0, 0.0], [[1.0, 0.0], [0.0, NOT_FULL**2 / noise]]
        self.num_steps: dict[int, int] = {}  # timed, by K
        self.slowness_at: dict[int, float] = {}  # K -> when it was timed last
        self.last_step = 0  # of any size

    def begin(self, width: int, log_sec: float, covariances: Sequence[float], variance: float) -> None:
        """With a K that was not known."""
        self.place[width] = len(self.state)
        self.state.append(log_sec)
        for row, each in zip(self.covariance, covariances, strict=True):
            row.append(each)
        self.covariance.append([*covariances, variance])
        self.slowness_at[width] = self.state[0]

    def pass_steps(self, count: int) -> None:
        """So many since the last one of this size."""
        self.covariance[0][0] += min(DRIFT * count, MOST_DRIFT)
        for i in range(1, len(self.state)):
            self.covariance[i][i] += OWN_DRIFT * count

    def observe(self, width: int, log_sec: float, noise: float, is_full: bool) -> float:
        """A step. Returns how far it was off, squared and beside what was to be expected, ``ODD`` squared at most."""
        self.num_steps[width] = self.num_steps.get(width, 0) + 1
        parts = [0] if is_full else [0, 1]
        gains = [sum(row[i] for i in parts) for row in self.covariance]
        off = log_sec - sum(self.state[i] for i in parts)
        if width not in self.place:
            self.begin(width, off, [-each for each in gains], 1.0 + sum(gains[i] for i in parts))
            return 1.0
        i = self.place[width]
        off -= self.state[i]
        gains = [gain + row[i] for gain, row in zip(gains, self.covariance, strict=True)]
        variance = sum(gains[j] for j in parts) + gains[i] + 1.0
        oddness = off * off / (variance * noise)
        excess = variance * max(0.0, oddness / ODD**2 - 1)
        variance += excess
        if off < 0:  # nothing makes a single step so fast: the machine is
            self.covariance[0][0] += excess
            gains[0] += excess
        for j, gain in enumerate(gains):
            self.state[j] += gain / variance * off
        for row, a in zip(self.covariance, gains, strict=True):
            for j, b in enumerate(gains):
                row[j] -= a * b / variance
        self.slowness_at[width] = self.state[0]
        return min(oddness, ODD**2)

    def doubt(self, width: int, log_sec: float, noise: float) -> None:
        """What is known of this K may be wrong by so much."""
        i = self.place[width]
        self.covariance[i][i] += log_sec**2 / noise

    def were_others(self, noise: float, doubt: float) -> None:
        """What is known is of another kind of steps: the K compare much as they do there, the level may be another."""
        self.covariance[0][0] += LENT_LEVEL**2 / noise
        for width in self.place:
            self.doubt(width, doubt, noise)

    def lent(self, scale: float) -> _Size:
        """A copy, for batches of another kind, whose noise has a variance ``scale`` times as small."""
        size = _Size(1.0)
        size.place, size.state, size.slowness_at = dict(self.place), list(self.state), dict(self.slowness_at)
        size.covariance = [[scale * each for each in row] for row in self.covariance]
        size.num_steps = dict.fromkeys(self.place, BORROWED)
        return size

    def as_json(self) -> dict[str, Any]:
        return {"widths": list(self.place), "state": self.state, "covariance": self.covariance,
                "num_steps": [self.num_steps[width] for width in self.place]}  # fmt: skip

    @classmethod
    def of_json(cls, tree: Mapping[str, Any]) -> _Size:
        """Raises ValueError, KeyError or TypeError where that is none."""
        size = cls(1.0)
        widths, state = [int(width) for width in tree["widths"]], [float(each) for each in tree["state"]]
        covariance = [[float(each) for each in row] for row in tree["covariance"]]
        lengths = {len(widths) + 2, len(state), len(covariance), *map(len, covariance)}
        if len(lengths) > 1 or not all(map(math.isfinite, chain(state, *covariance))):
            raise ValueError("its figures do not fit together")
        size.place = {width: i + 2 for i, width in enumerate(widths)}
        size.state, size.covariance = state, covariance
        size.slowness_at = dict.fromkeys(widths, state[0])
        size.num_steps = {width: int(count) for width, count in zip(widths, tree["num_steps"], strict=True)}
        return size

    def seconds(self) -> dict[int, float]:
        """Of each K, at the machine's present speed, of the full batch."""
        return {width: math.exp(self.state[0] + self.state[i]) for width, i in self.place.items()}


class StepTimes:
    """Seconds of decode steps by batch size and K.

    Batch sizes up to a power of two share their times: each counts as what it would have been at the full size, by what
    lies between two sizes and by what such batches were found to take. Kernels like full blocks: a step of 31 sequences
    may take longer than one of 32 (here by 2 % with K = 1, by 6 in plain decode), so a share of it would mislead.

    On a shared machine steps differ by a fifth, for seconds at a time and whatever K is: two K that are timed one after
    the other cannot be told apart by their means or medians. By how much a step differs from those just before it tells
    more. So the log of its time is taken for a sum of three: the machine's slowness, a random walk; what the K takes,
    which hardly changes; and noise, whose variance is learned. A Kalman filter (Kalman, 1960) keeps what is known of
    all K, and how well each is known beside another: less and less well, while it is not served.

    What disturbs a step makes it slower, never faster: the more a slow one is out of all proportion, the less it
    counts, and one that is as much too fast says that the machine, not this K, has become faster. And since a step that
    drafts more does more, a narrower step never counts as slower than a wider one, nor a plain one as slower than
    ``DRAFTING`` allows.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._noise = FIRST_NOISE**2
        self._num_steps = 0

    def observe(self, batch: int, num_draft_tokens: int, seconds: float) -> None:
        """A step took so long; one that took none tells nothing."""
        if seconds <= 0:
            return
        size = self._sizes.setdefault(bucket(batch), _Size(self._noise))
        self._num_steps += 1
        size.pass_steps(self._num_steps - size.last_step)
        size.last_step = self._num_steps
        log_sec = math.log(seconds / self._share_of_full(batch))
        off = size.observe(num_draft_tokens, log_sec, self._noise, batch == bucket(batch))
        self._noise = max(LEAST_NOISE**2, self._noise * (1 + NOISE_GAIN * (off - 1)))

    def _share_of_full(self, batch: int) -> float:
        """How long a step takes beside one of the full batch size, by how much longer that one takes than a half.

        One figure for all K: each K's own, from few steps, would favour the K with the largest error.
        """
        size = bucket(batch)
        if batch == size:
            return 1.0
        full, half = (self._sizes[each].seconds() if each in self._sizes else {} for each in (size, size // 2))
        both = full.keys() & half.keys()
        longer = sum(full[k] for k in both)
        growth = min(1.0, max(0.0, 2 * (1 - sum(half[k] for k in both) / longer))) if both else UNKNOWN_GROWTH
        return 1 - growth * (1 - batch / size)

    def borrow(self, other: StepTimes, batch: int, max_draft_tokens: int) -> None:
        """Start from what ``other`` knows of this batch size, if that is plain and widest steps and nothing is known
        here."""
        lender, mine = (times._sizes.get(bucket(batch)) for times in (other, self))
        if mine is not None or lender is None or not {0, max_draft_tokens} <= lender.place.keys():
            return
        if not self._num_steps:
            self._noise = other._noise
        mine = self._sizes[bucket(batch)] = lender.lent(other._noise / self._noise)
        mine.last_step = self._num_steps
        mine.were_others(self._noise, LENT_DOUBT)

    def were_others(self, doubt: float = LENT_DOUBT) -> None:
        """The steps observed so far had no user's text in them, which makes them shorter, those of all K alike, or were
        those of another server."""
        for size in self._sizes.values():
            size.were_others(self._noise, doubt)

    def as_json(self) -> dict[str, Any]:
        """All that is known, for ``restore``."""
        sizes = {str(batch): size.as_json() for batch, size in self._sizes.items()}
        return {"noise": self._noise, "sizes": sizes}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Start from what another server knew of such steps.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: this is no ``as_json``. Nothing is changed.
        """
        sizes = {int(batch): _Size.of_json(each) for batch, each in tree["sizes"].items()}
        self._noise, self._sizes = max(LEAST_NOISE**2, float(tree["noise"])), sizes
        self.were_others(KEPT_DOUBT)

    def timed_sizes(self, max_draft_tokens: int, num_steps: int = 1) -> set[int]:
        """Batch sizes of whose plain and widest steps as many were timed."""
        ends = 0, max_draft_tokens
        return {size for size in self._sizes if min(self.num_observed(size, k) for k in ends) >= num_steps}

    def doubt(self, batch: int, num_draft_tokens: int) -> None:
        """What was measured of this K counts the less, the more the machine's speed has changed since."""
        size = self._sizes.get(bucket(batch))
        if size is not None and num_draft_tokens in size.place:
            size.doubt(num_draft_tokens, MOVED_DOUBT * math.log(self.moved(batch, num_draft_tokens)), self._noise)

    def doubt_drafting(self, batch: int, log_sec: float) -> None:
        """How much longer each K takes than plain decode may be wrong by so much from now on."""
        size = self._sizes.get(bucket(batch))
        if size is not None:
            for width in filter(None, size.place):
                size.doubt(width, log_sec, self._noise)

    def moved(self, batch: int, num_draft_tokens: int) -> float:
        """By which factor the machine's speed has changed, up or down, since this K was timed; at least 1."""
        size = self._sizes.get(bucket(batch))
        if size is None or num_draft_tokens not in size.place:
            return 1.0
        return math.exp(abs(size.state[0] - size.slowness_at[num_draft_tokens]))

    def uncertainty(self, batch: int, num_draft_tokens: int, than: int) -> float:
        """Standard deviation of the log of how much longer this K takes than another one."""
        size = self._sizes.get(bucket(batch))
        if size is None or not {num_draft_tokens, than} <= size.place.keys():
            return UNKNOWN_UNCERTAINTY
        i, j = size.place[num_draft_tokens], size.place[than]
        variance = size.covariance[i][i] + size.covariance[j][j] - 2 * size.covariance[i][j]
        return math.sqrt(max(0.0, variance) * self._noise)

    def num_observed(self, batch: int, num_draft_tokens: int) -> int:
        """Steps; what was borrowed counts as ``BORROWED``."""
        size = self._sizes.get(bucket(batch))
        return size.num_steps.get(num_draft_tokens, 0) if size is not None else 0

    def nearest(self, batch: int, max_draft_tokens: int) -> int:
        """The batch size closest to ``batch`` whose plain and widest steps were timed; ``batch`` where its own were, or
        none."""
        sizes = self.timed_sizes(max_draft_tokens)
        if bucket(batch) in sizes:
            return batch
        return min(sizes, key=lambda size: abs(math.log2(size / bucket(batch))), default=batch)

    def estimate(self, batch: int, num_draft_tokens: int) -> float | None:
        """Seconds; None outside the widths that were measured."""
        return self.estimates(batch, num_draft_tokens)[num_draft_tokens]

    def estimates(self, batch: int, max_draft_tokens: int) -> list[float | None]:
        """Seconds of each K from 0 on; between two measured widths by a straight line, None outside them."""
        size = self._sizes.get(bucket(batch))
        row = sorted(size.seconds().items()) if size is not None else []
        rising = list(accumulate((seconds for _, seconds in reversed(row)), min))[::-1]
        row = [(k, seconds) for (k, _), seconds in zip(row, rising, strict=True)]
        if len(row) > 1 and row[0][0] == 0:
            row[0] = (0, min(row[0][1], row[1][1] / DRAFTING))
        share = self._share_of_full(batch)
        if size is not None and batch != bucket(batch):
            share *= math.exp(size.state[1])
        return [_on_line(row, k, share) for k in range(max_draft_tokens + 1)]


def _on_line(row: list[tuple[int, float]], width: int, share: float) -> float | None:
    below = [item for item in row if item[0] <= width]
    above = [item for item in row if item[0] >= width]
    if not below or not above:
        return None
    (k0, t0), (k1, t1) = below[-1], above[0]
    return share * (t0 if k0 == k1 else t0 + (t1 - t0) * (width - k0) / (k1 - k0))


def bucket(batch: int) -> int:
    """The power of two at or above ``batch``."""
    return 1 << max(0, batch - 1).bit_length()
