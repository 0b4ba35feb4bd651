"""What the policy knows of acceptance, from drafts of the recent past. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

DOUBT, DOUBT_DRAFTS = 2.5, 4  # standard deviations, and drafts that must have been seen
STRETCHES = 0.44  # by which the first position's log odds fall for the log of the tokens that a step puts out
LATELY = 64.0  # drafts by which a change of the text is noticed:
ODD, ODD_DRAFTS = 4.0, 12  # standard deviations by which they are off, and drafts that must have been seen


@dataclass(slots=True)
class Counts:
    """How often position i was tried and accepted; what is ``window`` tries ago counts 1/e."""

    window: float
    tries: list[float]
    hits: list[float]

    def observe(self, tries: Sequence[int], hits: Sequence[int]) -> list[float]:
        """Those of a step. Returns what is left of the older ones at each position."""
        left = [(1 - 1 / self.window) ** count for count in tries]
        for i, (keep, count, accepted) in enumerate(zip(left, tries, hits, strict=True)):
            if count:
                weight = (1 - keep) * self.window
                self.tries[i] = keep * self.tries[i] + weight
                self.hits[i] = keep * self.hits[i] + weight * accepted / count
        return left

    def limit(self, i: int, tries: float) -> None:
        """Let position i count as ``tries`` at most."""
        if self.tries[i] > tries:
            self.hits[i] *= tries / self.tries[i]
            self.tries[i] = tries


@dataclass(slots=True)
class AcceptanceModel:
    """Decayed counts of how often position i was accepted when it was reached.

    The prior counts as ``prior_weight`` drafts. When the first position, which every draft reaches, falls ``DOUBT``
    standard deviations below it, what training said of it is taken back, and what it said of the others, which are then
    seldom reached, is lowered by the same factor: a useless head is soon seen.

    A long memory tells K apart that differ by 2 %, a short one follows the text. So the last ``window`` drafts count,
    until the last ``LATELY`` are off by ``ODD`` standard deviations: then only these do, each position by itself.

    Text has easy and hard stretches. The more tokens a step puts out, the fewer steps an easy one takes, so the more
    drafts begin in hard ones, where their first token is seldomer accepted: by ``STRETCHES``, greedy or not (measured,
    ``experiments/LOG.md``). What is expected of a K is corrected by that for the K that were served.
    """

    prior: list[float]
    window: float
    prior_weight: float
    counts: Counts = field(init=False)
    lately: Counts = field(init=False)
    prior_tries: list[float] = field(init=False)  # the prior's part of the counts' tries
    log_length: float = field(init=False)  # of what was expected of the drafts that count, the mean

    def __post_init__(self) -> None:
        self.prior_tries = [self.prior_weight] * len(self.prior)
        hits = [self.prior_weight * rate for rate in self.prior]
        self.counts = Counts(self.window, [*self.prior_tries], hits)
        self.lately = Counts(min(LATELY, self.window), [0.0] * len(self.prior), [0.0] * len(self.prior))
        self.log_length = self._log_length(len(self.prior))  # as training measures

    def observe(self, drafts: Mapping[tuple[int, int], int]) -> None:
        """A step's drafts: of so many tokens, the first so many accepted -> how many such drafts."""
        tries, hits, drafted = [0] * len(self.prior), [0] * len(self.prior), [0] * len(self.prior)
        for (num_drafted, num_accepted), count in drafts.items():
            reached = min(num_drafted, num_accepted + 1, len(self.prior))
            for i in range(reached):
                tries[i] += count
                hits[i] += count * (i < num_accepted)
            if reached:
                drafted[min(num_drafted, len(self.prior)) - 1] += count
        if not sum(drafted):
            return
        before = self.counts.tries[0]
        left = self.counts.observe(tries, hits)
        self.lately.observe(tries, hits)
        self.prior_tries = [keep * each for keep, each in zip(left, self.prior_tries, strict=True)]
        news = 1 - left[0] * before / self.counts.tries[0]
        for i in filter(self._is_odd, range(len(self.prior))):
            self._limit(i, self.lately.tries[i])
            self.counts.hits[i] = self.lately.hits[i]
            news = news if i else 1.0
        length = sum(count * self._log_length(i + 1) for i, count in enumerate(drafted) if count) / tries[0]
        self.log_length += news * (length - self.log_length)
        self._doubt()

    def forget(self, num_drafts: float) -> None:
        """Let what was seen so far count as ``num_drafts`` drafts at most, so that what comes next decides."""
        for i in range(len(self.prior)):
            self._limit(i, num_drafts)
            self.lately.limit(i, num_drafts)

    def _limit(self, i: int, tries: float) -> None:
        self.prior_tries[i] *= min(1.0, tries / self.counts.tries[i])
        self.counts.limit(i, tries)

    def _is_odd(self, i: int) -> bool:
        """Whether the last drafts are unlike those before. Half the tries count for the variance of a decaying sum."""
        tries, hits = self.lately.tries[i], self.lately.hits[i]
        rate = self.counts.hits[i] / self.counts.tries[i]
        variance = tries / 2 * max(rate * (1 - rate), 1 / LATELY)
        return tries >= ODD_DRAFTS and abs(hits - tries * rate) > ODD * math.sqrt(variance)

    def _doubt(self) -> None:
        counts, prior, weight = self.counts, self.prior[0], self.prior_tries[0]
        seen = counts.tries[0] - weight
        missing = seen * prior - (counts.hits[0] - weight * prior)
        if weight and seen >= DOUBT_DRAFTS and missing > DOUBT * math.sqrt(seen * prior * (1 - prior)):
            counts.tries[0], self.prior_tries[0] = seen, 0.0
            counts.hits[0] = max(0.0, counts.hits[0] - weight * prior)
            lost = 1 - counts.hits[0] / (seen * prior)
            for i in range(1, len(self.prior)):
                counts.hits[i] = max(0.0, counts.hits[i] - lost * self.prior_tries[i] * self.prior[i])
                self.prior[i] *= 1 - lost

    @property
    def conditional_rates(self) -> list[float]:
        """Acceptance of position i among the drafts accepted before it."""
        return [hits / tries for hits, tries in zip(self.counts.hits, self.counts.tries, strict=True)]

    def expected_tokens(self, num_draft_tokens: int, imagined: float = 0.0) -> float:
        """Tokens a sequence gains in a step, its bonus token included. ``imagined``: acceptances added everywhere."""
        counts = zip(self.counts.hits[:num_draft_tokens], self.counts.tries, strict=False)
        rates = [(hits + imagined) / (tries + imagined) for hits, tries in counts]
        if rates:
            harder = STRETCHES * (math.log(expected_length(rates)) - self.log_length)
            rates[0] *= math.exp(-harder * (1 - rates[0]))  # log odds fall by ``harder``, which is small
        return expected_length(rates)

    def uncertainty(self, num_draft_tokens: int, than: int) -> float:
        """Standard deviation of the log of how many more tokens than another K this one gives: of the first position
        that the other leaves out."""
        if num_draft_tokens <= than:
            return 0.0
        more = 1 - self.expected_tokens(than) / self.expected_tokens(num_draft_tokens)
        hits, tries = self.counts.hits[than], self.counts.tries[than]
        return more * math.sqrt((tries - hits) / tries / max(hits, 1.0))

    def _log_length(self, num_drafted: int) -> float:
        return math.log(expected_length(self.conditional_rates[:num_drafted]))


def expected_length(conditional_rates: Iterable[float]) -> float:
    """Tokens of a draft as long as the rates, its bonus token included: 1 + c1 + c1 c2 + ..."""
    expected = reached = 1.0
    for rate in conditional_rates:
        reached *= rate
        expected += reached
    return expected
