"""What the policy knows of acceptance, from drafts of the recent past. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

DOUBT, DOUBT_DRAFTS = 2.5, 4  # standard deviations, and drafts that must have been seen
STRETCHES = 0.44  # by which the first position's log odds fall for the log of the tokens that a step puts out


@dataclass(slots=True)
class AcceptanceModel:
    """Decayed counts of how often position i was accepted when it was reached.

    The prior counts as ``prior_weight`` drafts. When the first position, which every draft reaches, falls ``DOUBT``
    standard deviations below it, what training said of it is taken back, and what it said of the others, which are then
    seldom reached, is lowered by the same factor: a useless head is soon seen.

    Text has easy and hard stretches. The more tokens a step puts out, the fewer steps an easy one takes, so the more
    drafts begin in hard ones, where their first token is seldomer accepted: by ``STRETCHES``, greedy or not (measured,
    ``experiments/LOG.md``). What is expected of a K is corrected by that for the K that were served.
    """

    prior: list[float]
    window: float
    prior_weight: float
    tries: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    prior_tries: list[float] = field(default_factory=list)  # the prior's part of ``tries``
    log_length: float = 0.0  # of what was expected of the drafts that count, the mean

    def __post_init__(self) -> None:
        self.prior_tries = [self.prior_weight] * len(self.prior)
        self.tries = [self.prior_weight] * len(self.prior)
        self.hits = [self.prior_weight * rate for rate in self.prior]
        self.log_length = self._log_length(len(self.prior))  # as training measures

    def observe(self, num_drafted: int, num_accepted: int, count: int = 1) -> None:
        """``count`` drafts of ``num_drafted`` tokens of which the first ``num_accepted`` were accepted."""
        keep = (1 - 1 / self.window) ** count
        weight = (1 - keep) * self.window
        for i in range(min(num_drafted, num_accepted + 1, len(self.tries))):
            self.tries[i] = keep * self.tries[i] + weight
            self.hits[i] = keep * self.hits[i] + weight * (i < num_accepted)
            self.prior_tries[i] *= keep
        if num_drafted and self.tries:
            self.log_length += weight / self.tries[0] * (self._log_length(num_drafted) - self.log_length)
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
        counts = zip(self.hits[:num_draft_tokens], self.tries, strict=False)
        rates = [(hits + imagined) / (tries + imagined) for hits, tries in counts]
        if rates:
            harder = STRETCHES * (math.log(expected_length(rates)) - self.log_length)
            rates[0] *= math.exp(-harder * (1 - rates[0]))  # log odds fall by ``harder``, which is small
        return expected_length(rates)

    def _log_length(self, num_drafted: int) -> float:
        return math.log(expected_length(self.conditional_rates[:num_drafted]))


def expected_length(conditional_rates: Iterable[float]) -> float:
    """Tokens of a draft as long as the rates, its bonus token included: 1 + c1 + c1 c2 + ..."""
    expected = reached = 1.0
    for rate in conditional_rates:
        reached *= rate
        expected += reached
    return expected
