"""Is the head still as good as training found it? Page's CUSUM test on acceptance, in both directions.

Each verified position is a trial whose chance of acceptance was c_i on held-out prompts. Against it stands a head that
has lost ``LOSS`` of every c_i. The sum of the log likelihood ratios is kept at or above 0; past ``THRESHOLD`` it is no
longer chance (E. S. Page, Continuous inspection schemes, Biometrika 1954). The alarm ends by the same test the other
way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LOSS = 0.3  # of each conditional rate: what is worth an alarm
THRESHOLD = 20.0  # nats; wide, because the drafts of one conversation resemble each other
REPORTED_DRAFTS = 500.0  # that the rate in the reason is averaged over


class DriftDetector:
    """``reason`` is a sentence while the alarm lasts, else None."""

    def __init__(self, trained_rates: Sequence[float]) -> None:
        self.trained = [min(max(rate, 0.02), 0.98) for rate in trained_rates]
        # Log likelihood ratios, bad over good.
        self._accepted = [math.log(1 - LOSS)] * len(self.trained)
        self._rejected = [math.log((1 - (1 - LOSS) * rate) / (1 - rate)) for rate in self.trained]
        self.reason: str | None = None
        self._sum = 0.0
        self._length: float | None = None

    @property
    def trained_length(self) -> float:
        """τ that the trained rates give."""
        length = reached = 1.0
        for rate in self.trained:
            reached *= rate
            length += reached
        return length

    def observe(self, num_drafted: int, num_accepted: int, count: int = 1) -> bool:
        """``count`` like drafts; True when the alarm begins or ends with them."""
        width = len(self.trained)
        if num_drafted >= width:
            new = 1.0 + min(num_accepted, width)
            old = new if self._length is None else self._length
            self._length = old + (new - old) * min(1.0, count / REPORTED_DRAFTS)
        evidence = sum(self._accepted[: min(num_drafted, num_accepted)])
        if num_accepted < min(num_drafted, width):
            evidence += self._rejected[num_accepted]
        self._sum = max(0.0, self._sum + count * (-evidence if self.reason else evidence))
        if self._sum < THRESHOLD:
            return False
        self._sum = 0.0
        self.reason = None if self.reason else self._describe()
        return True

    def _describe(self) -> str:
        measured = f"about {self._length:.2f}" if self._length is not None else "lower"
        return (
            f"the acceptance length is {measured}, training measured {self.trained_length:.2f}: other prompts than the "
            "head was trained on, another sampling temperature, or another target"
        )
