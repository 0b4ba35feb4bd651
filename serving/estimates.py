"""What the policy knows of acceptance and of step times, from drafts and steps of the recent past. Pure Python."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate

DOUBT, DOUBT_DRAFTS = 2.5, 4  # standard deviations, and drafts that must have been seen
UNDISTURBED = 4  # one in so many steps is undisturbed
DRAFTING = 1.05  # a step that drafts takes so much longer, at least: a head runs one layer, its target some thirty
BORROWED = 2  # steps that a time counts for that is of another kind of batch, or of made-up requests
UNKNOWN_GROWTH = 0.6  # of a step's time, what grows with the batch


@dataclass(slots=True)
class AcceptanceModel:
    """Decayed counts of how often position i was accepted when it was reached.

    The prior counts as ``prior_weight`` drafts. When the first position, which every draft reaches, falls ``DOUBT``
    standard deviations below it, what training said of it is taken back, and what it said of the others, which are then
    seldom reached, is lowered by the same factor: a useless head is soon seen.
    """

    prior: list[float]
    window: float
    prior_weight: float
    tries: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    prior_tries: list[float] = field(default_factory=list)  # the prior's part of ``tries``

    def __post_init__(self) -> None:
        self.prior_tries = [self.prior_weight] * len(self.prior)
        self.tries = [self.prior_weight] * len(self.prior)
        self.hits = [self.prior_weight * rate for rate in self.prior]

    def observe(self, num_drafted: int, num_accepted: int, count: int = 1) -> None:
        """``count`` drafts of ``num_drafted`` tokens of which the first ``num_accepted`` were accepted."""
        keep = (1 - 1 / self.window) ** count
        weight = (1 - keep) * self.window
        for i in range(min(num_drafted, num_accepted + 1, len(self.tries))):
            self.tries[i] = keep * self.tries[i] + weight
            self.hits[i] = keep * self.hits[i] + weight * (i < num_accepted)
            self.prior_tries[i] *= keep
        if self.tries:
            self._doubt()

    def forget(self, num_drafts: float) -> None:
        """Let what was seen so far count as ``num_drafts`` drafts at most, so that what comes next decides."""
        for i, tries in enumerate(self.tries):
            if tries > num_drafts:
                self.hits[i] *= num_drafts / tries
                self.prior_tries[i] *= num_drafts / tries
                self.tries[i] = num_drafts

    def _doubt(self) -> None:
        prior, weight = self.prior[0], self.prior_tries[0]
        seen = self.tries[0] - weight
        missing = seen * prior - (self.hits[0] - weight * prior)
        if weight and seen >= DOUBT_DRAFTS and missing > DOUBT * math.sqrt(seen * prior * (1 - prior)):
            self.tries[0], self.prior_tries[0] = seen, 0.0
            self.hits[0] = max(0.0, self.hits[0] - weight * prior)
            lost = 1 - self.hits[0] / (seen * prior)
            for i in range(1, len(self.hits)):
                self.hits[i] = max(0.0, self.hits[i] - lost * self.prior_tries[i] * self.prior[i])
                self.prior[i] *= 1 - lost

    @property
    def conditional_rates(self) -> list[float]:
        """Acceptance of position i among the drafts accepted before it."""
        return [hits / tries for hits, tries in zip(self.hits, self.tries, strict=True)]

    def expected_tokens(self, num_draft_tokens: int, imagined: float = 0.0) -> float:
        """Tokens a sequence gains in a step, its bonus token included. ``imagined``: acceptances added everywhere."""
        expected = reached = 1.0
        for hits, tries in zip(self.hits[:num_draft_tokens], self.tries, strict=False):
            reached *= (hits + imagined) / (tries + imagined)
            expected += reached
        return expected


@dataclass(slots=True)
class StepTimes:
    """Typical seconds of the last decode steps by batch size and K.

    Batch sizes up to a power of two share their times: each counts as what it would have been at the full size.

    What disturbs a step makes it slower, never faster: on a shared machine by a quarter on average, for a step or for
    seconds, while the undisturbed ones agree to a few per cent. So a typical step is one that a quarter of the steps
    were faster than, of as many as the window holds: a trial that was disturbed for most of its time still tells, and
    steps of different moments compare. No fewer, for steps that verify sampled drafts differ by more than plain ones
    do, and by the fastest alone drafting would look cheaper than it is.

    A machine's speed changes, for all K alike. So while one K is served, what was measured of the others at this batch
    size moves with it, as soon as its own is that of a full window of such steps; before, it still moves because it
    becomes more certain. How far the served time has moved since another was measured tells how little that one is
    still worth: not every change is the machine's, and the first steps may have met one that was busy. And since a
    step that drafts more does more, a narrower step never counts as slower than a wider one, nor a plain one as slower
    than ``DRAFTING`` allows: it was disturbed then.
    """

    window: int
    _last: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    _typical: dict[tuple[int, int], float] = field(default_factory=dict)
    _moved: dict[tuple[int, int], float] = field(default_factory=dict)  # log of the served one's change since then
    _borrowed: dict[tuple[int, int], float] = field(default_factory=dict)  # as lent, until it has steps of its own
    _served: tuple[int, int] = (0, 0)  # batch size and K of the last steps that were no trial,
    _num_served: int = 0  # and how many came in a row

    def observe(self, batch: int, num_draft_tokens: int, seconds: float, is_trial: bool = False) -> None:
        """A step took so long; ``is_trial``: with a K that is not being served."""
        key = bucket(batch), num_draft_tokens
        seconds /= self._share_of_full(batch)
        last = self._last.setdefault(key, deque(maxlen=self.window))
        before = self._typical.get(key, 0.0)
        last.append(seconds)
        has_own = key in self._borrowed and len(last) >= 2 * BORROWED
        if has_own:
            self.keep_newest(batch, num_draft_tokens, BORROWED)
        self._typical[key] = sorted(last)[len(last) // UNDISTURBED]
        self._moved[key] = 0.0
        if has_own:
            self._move_borrowed(key)
        if is_trial:
            return
        self._num_served = self._num_served + 1 if key == self._served else 1
        self._served = key
        if before > 0 and self._typical[key] not in (0.0, before):
            self._move_others(key, self._typical[key] / before, is_certain=self._num_served > self.window)

    def _move_others(self, key: tuple[int, int], factor: float, is_certain: bool) -> None:
        for other in self._typical:
            if other[0] == key[0] and other != key:
                self._moved[other] += math.log(factor)
                if is_certain:
                    self._typical[other] *= factor
                    self._last[other] = deque((seconds * factor for seconds in self._last[other]), self.window)

    def _move_borrowed(self, key: tuple[int, int]) -> None:
        """``key`` has steps of its own now: what is still borrowed of its batch size differs by as much."""
        factor = self._typical[key] / self._borrowed.pop(key)
        for other, lent in self._borrowed.items():
            if other[0] == key[0]:
                self._typical[other], self._moved[other] = lent * factor, 0.0
                self._last[other] = deque([lent * factor] * BORROWED, self.window)

    def _share_of_full(self, batch: int) -> float:
        """How long a step takes beside one of the full batch size, by how much longer that one takes than a half.

        One figure for all K: each K's own, from few steps, would favour the K with the largest error.
        """
        size = bucket(batch)
        if batch == size:
            return 1.0
        widths = [k for each, k in self._typical if each == size and (size // 2, k) in self._typical]
        full, half = (sum(self._typical[each, k] for k in widths) for each in (size, size // 2))
        growth = min(1.0, max(0.0, 2 * (1 - half / full))) if full else UNKNOWN_GROWTH
        return 1 - growth * (1 - batch / size)

    def borrow(self, other: StepTimes, batch: int, max_draft_tokens: int) -> None:
        """Start from what ``other`` knows of this batch size, if it knows plain and widest steps.

        Each time stands for ``BORROWED`` steps until there are as many of its own, and is moved as far as those of
        another K differ from what was borrowed for that one.
        """
        size = bucket(batch)
        row = {key: seconds for key, seconds in other._typical.items() if key[0] == size}
        if (size, 0) not in row or (size, max_draft_tokens) not in row:
            return
        for key, seconds in row.items():
            if key not in self._typical:
                self._lend(key, seconds)

    def were_made_up(self) -> None:
        """The steps observed so far had no user's text in them, which makes them shorter, those of all K alike.

        So they count as borrowed ones.
        """
        for key, seconds in self._typical.items():
            self._lend(key, seconds)

    def _lend(self, key: tuple[int, int], seconds: float) -> None:
        self._last[key] = deque([seconds] * BORROWED, self.window)
        self._typical[key], self._moved[key], self._borrowed[key] = seconds, 0.0, seconds

    def keep_newest(self, batch: int, num_draft_tokens: int, num_kept: int) -> None:
        """Of what was measured so far only the last ``num_kept`` steps count; of none, until the next such step."""
        last = self._last.get((bucket(batch), num_draft_tokens), deque())
        while len(last) > num_kept:
            last.popleft()

    def moved(self, batch: int, num_draft_tokens: int) -> float:
        """By which factor the served time has changed, up or down, since this one was measured; at least 1."""
        return math.exp(abs(self._moved.get((bucket(batch), num_draft_tokens), 0.0)))

    def num_observed(self, batch: int, num_draft_tokens: int) -> int:
        """At most the window."""
        return len(self._last.get((bucket(batch), num_draft_tokens), ()))

    def nearest(self, batch: int, max_draft_tokens: int) -> int:
        """The batch size closest to ``batch`` whose plain and widest steps were timed; ``batch`` where its own were, or
        none."""
        sizes = [size for size, k in self._typical if k == 0 and (size, max_draft_tokens) in self._typical]
        if bucket(batch) in sizes:
            return batch
        return min(sizes, key=lambda size: abs(math.log2(size / bucket(batch))), default=batch)

    def estimate(self, batch: int, num_draft_tokens: int) -> float | None:
        """Seconds; None outside the widths that were measured."""
        return self.estimates(batch, num_draft_tokens)[num_draft_tokens]

    def estimates(self, batch: int, max_draft_tokens: int) -> list[float | None]:
        """Seconds of each K from 0 on; between two measured widths by a straight line, None outside them."""
        size = bucket(batch)
        row = sorted((k, self._typical[each, k]) for each, k in self._typical if each == size)
        rising = list(accumulate((seconds for _, seconds in reversed(row)), min))[::-1]
        row = [(k, seconds) for (k, _), seconds in zip(row, rising, strict=True)]
        if len(row) > 1 and row[0][0] == 0:
            row[0] = (0, min(row[0][1], row[1][1] / DRAFTING))
        share = self._share_of_full(batch)
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
