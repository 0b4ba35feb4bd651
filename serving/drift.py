"""Is the head still as good as training found it? Page's CUSUM test on acceptance, in both directions.

Each verified position is a trial whose chance of acceptance was c_i on held-out prompts. Against it stands a head that
has lost ``LOSS`` of every c_i. The sum of the log likelihood ratios is kept at or above 0; past ``THRESHOLD`` it is no
longer chance (E. S. Page, Continuous inspection schemes, Biometrika 1954). The alarm ends by the same test the other
way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from serving.acceptance import expected_length
from serving.draft_rates import DraftRates

LOSS = 0.3  # of each conditional rate: what is worth an alarm
THRESHOLD = 20.0  # nats; wide, because the drafts of one conversation resemble each other
REPORTED_DRAFTS = 500.0  # that the rates in the reason are averaged over


class DriftDetector:
    """Told of every draft; ``is_on`` while the alarm lasts."""

    def __init__(self, trained_rates: Sequence[float]) -> None:
        self.trained = [min(max(rate, 0.02), 0.98) for rate in trained_rates]
        # Log likelihood ratios, bad over good.
        self._accepted = [math.log(1 - LOSS)] * len(self.trained)
        self._rejected = [math.log((1 - (1 - LOSS) * rate) / (1 - rate)) for rate in self.trained]
        self.is_on = False
        self._sum = 0.0
        self._lately = DraftRates(len(self.trained), REPORTED_DRAFTS)

    @property
    def trained_length(self) -> float:
        """τ that the trained rates give."""
        return expected_length(self.trained)

    @property
    def reason(self) -> str | None:
        """A sentence while the alarm lasts, with τ by what is accepted now, of drafts as long as the trained rates."""
        if not self.is_on:
            return None
        rates = zip(self._lately.conditional_rates, self.trained, strict=True)
        now = expected_length(trained if lately is None else lately for lately, trained in rates)
        return (
            f"the acceptance length is about {now:.2f}, training measured {self.trained_length:.2f}: other prompts "
            "than the head was trained on, another sampling temperature, or another target"
        )

    def observe(self, num_drafted: int, num_accepted: int, count: int = 1) -> bool:
        """``count`` like drafts; True when the alarm begins or ends with them."""
        width = len(self.trained)
        self._lately.record(num_drafted, num_accepted, count)
        evidence = sum(self._accepted[: min(num_drafted, num_accepted)])
        if num_accepted < min(num_drafted, width):
            evidence += self._rejected[num_accepted]
        self._sum = max(0.0, self._sum + count * (-evidence if self.is_on else evidence))
        if self._sum < THRESHOLD:
            return False
        self._sum = 0.0
        self.is_on = not self.is_on
        return True
