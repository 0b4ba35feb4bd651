"""After a swap: is the new head as good as the old one was? Wald's sequential test on acceptance.

Each verified position is a trial. Against "its chance is what the old head's was lately" stands "``LOSS`` of that is
gone"; the log likelihood ratios are summed until one side has won by ``THRESHOLD`` (A. Wald, Sequential tests of
statistical hypotheses, 1945). Of the old head's rates the lower bound counts that its own drafts leave no doubt of, so
a head that was barely seen can hardly be missed. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from serving.draft_rates import DraftRates

LOSS = 0.15  # of each conditional rate
THRESHOLD = 10.0  # nats
REQUEST_LIMIT = THRESHOLD / 3  # that one request may add: its drafts resemble each other
LEAST_DRAFTS = 64
DOUBT = 2.0  # standard errors
WINDOW = 1024.0  # drafts of the old head that count
MAX_DRAFTS = 4096  # without a decision: then a lead of REQUEST_LIMIT is enough, and without one the head stays
ROUNDING = 1e-6
LEAST_RATE = 0.05  # below it there is nothing to lose

WORSE, KEPT = "worse", "kept"


class HeadWatch:
    """Counts a new head's drafts until ``verdict`` is WORSE or KEPT; ``reason`` is then a sentence."""

    def __init__(self, old: DraftRates, stale: Collection[str] = ()) -> None:
        """``old``: what the old head's drafts came to. ``stale``: requests whose drafts say nothing of the new head."""
        self.stale = stale
        self.new = DraftRates(old.width)
        self.verdict: str | None = None
        self.reason: str | None = None
        self._old_length = old.full_length
        self._good = [
            _lower_bound(accepted, reached) for accepted, reached in zip(old.accepted, old.reached, strict=True)
        ]
        self._sums: dict[str, float] = {}  # of each request, within its limit
        self._total = 0.0
        if not self._good or self._good[0] < LEAST_RATE:
            self._decide(KEPT, f"the old head's {round(old.num_drafts)} recent drafts leave nothing to lose")

    def observe(self, request_id: str, num_drafted: int, num_accepted: int) -> None:
        """One draft of a request."""
        if self.verdict is not None or request_id in self.stale:
            return
        self.new.record(num_drafted, num_accepted)
        before = self._sums.get(request_id, 0.0)
        after = before + self._evidence(num_drafted, num_accepted)
        self._sums[request_id] = after = min(max(after, -REQUEST_LIMIT), REQUEST_LIMIT)
        self._total += after - before
        num_drafts = self.new.num_drafts
        needed = (REQUEST_LIMIT if num_drafts >= MAX_DRAFTS else THRESHOLD) - ROUNDING
        if num_drafts >= LEAST_DRAFTS and self._total >= needed:
            self._decide(WORSE, f"the acceptance length fell {self._figures()}")
        elif (num_drafts >= LEAST_DRAFTS and self._total <= -needed) or num_drafts >= MAX_DRAFTS:
            self._decide(KEPT, f"the acceptance length went {self._figures()}")

    def _evidence(self, num_drafted: int, num_accepted: int) -> float:
        total = 0.0
        for position, good in enumerate(self._good[:num_drafted]):
            if position > num_accepted or good < LEAST_RATE:
                break
            bad = (1 - LOSS) * good
            total += math.log(bad / good) if position < num_accepted else math.log((1 - bad) / (1 - good))
        return total

    def _decide(self, verdict: str, reason: str) -> None:
        self.verdict, self.reason = verdict, reason

    def _figures(self) -> str:
        return f"from {self._old_length:.2f} to {self.new.full_length:.2f} in {round(self.new.num_drafts)} drafts"


def _lower_bound(accepted: float, reached: float) -> float:
    """Of an acceptance rate, ``DOUBT`` standard errors down (Wilson's interval); 0 when nothing was reached."""
    if reached == 0:
        return 0.0
    rate, z2 = accepted / reached, DOUBT**2
    spread = DOUBT * math.sqrt(rate * (1 - rate) / reached + z2 / (4 * reached**2))
    return min(0.98, (rate + z2 / (2 * reached) - spread) / (1 + z2 / reached))
