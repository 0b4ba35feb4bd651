"""Which draft tokens are worth a row of the next step. Pure Python.

Of many sequences at once each token that is verified makes the step longer. What one more of each sequence costs is the
price: as a share of a plain step, so in tokens that plain decode would write meanwhile. Nearly all of it is
verification (``VERIFYING``); drafting is done by then. So a draft token that is hardly as likely as its price is not
verified, nor are those behind it. What the head says is somewhat less than how often such tokens are accepted, hence
``WORTH``. At one or two sequences at a time rows cost next to nothing; at 16, here, every second token is not worth it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.acceptance import Counts

VERIFYING = 0.95  # of the price, which is saved where a token is not verified (measured, ``experiments/LOG.md``)
WORTH = 0.75  # of the price: the head's probability of a token that just pays (likewise)
CUT_DOUBT = 0.1  # standard deviation of the log of how long a step with cut drafts takes, by what whole ones did
MOST_SAMPLED = 0.5  # a price above which drafts of sampled answers are verified whole: cutting gained nothing there
LEAST = 0.1  # where hardly a token is less likely than the threshold, all are verified, and so all are counted
WINDOW = 512.0  # drafts that the shares count
PRIOR_DRAFTS = 4.0  # that the start, when all are kept, is worth at each position


@dataclass(slots=True)
class DraftCut:
    """What a draft token costs by batch size, and how many of a draft's are kept."""

    width: int  # of the longest draft
    prices: dict[int, float] = field(default_factory=dict)  # of one more token a sequence, in plain steps
    counts: Counts = field(init=False)  # of drafts asked for their token at position i, and of those that keep it

    def __post_init__(self) -> None:
        start = [PRIOR_DRAFTS] * self.width
        self.counts = Counts(WINDOW, [*start], [*start])

    def observe(self, asked: int, kept: Mapping[int, int]) -> None:
        """A step's drafts of ``asked`` tokens: how many tokens were kept -> of how many sequences."""
        tries = [sum(kept.values()) if i < asked else 0 for i in range(self.width)]
        hits = [sum(n for length, n in kept.items() if length > i) for i in range(self.width)]
        self.counts.observe(tries, hits)

    def forget(self, num_drafts: float) -> None:
        """Let what was seen so far count as so many drafts at most."""
        for i in range(self.width):
            self.counts.limit(i, num_drafts)

    def kept(self, width: int) -> float:
        """Tokens that are kept of a draft of ``width``, in the mean."""
        return sum(hits / tries for hits, tries in zip(self.counts.hits[:width], self.counts.tries, strict=False))

    def saved(self, size: int, num_cut: float, sampled: bool) -> float:
        """Plain steps that are saved where so many tokens a sequence are not verified at this batch size."""
        return VERIFYING * self.prices[size] * num_cut if self.threshold(size, sampled) is not None else 0.0

    def threshold(self, size: int, sampled: bool) -> float | None:
        """Probability below which a draft token is not verified; None where all are: it is too low, not known, or of no
        use with answers that are ``sampled``."""
        price = self.prices.get(size, 0.0)
        if WORTH * price < LEAST or (sampled and price > MOST_SAMPLED):
            return None
        return WORTH * price
