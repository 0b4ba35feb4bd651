"""Drafts counted by position, lately or in all. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.acceptance import expected_length


@dataclass(slots=True)
class DraftRates:
    """Decayed (or with ``window`` None, plain) counts of drafts by position."""

    width: int
    window: float | None = None
    num_drafts: float = 0.0
    num_accepted: float = 0.0
    drafted: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafted, self.reached, self.accepted = ([0.0] * self.width for _ in range(3))

    def record(self, num_drafted: int, num_accepted: int, count: int = 1) -> None:
        """``count`` drafts of ``num_drafted`` tokens of which the first ``num_accepted`` were accepted."""
        keep = 1.0 if self.window is None else (1 - 1 / self.window) ** count
        weight = count if self.window is None else (1 - keep) * self.window
        self.num_drafts = keep * self.num_drafts + weight
        self.num_accepted = keep * self.num_accepted + weight * num_accepted
        for i in range(min(num_drafted, self.width)):
            self.drafted[i] = keep * self.drafted[i] + weight
            # Decayed together, so that accepted / drafted stays a share.
            self.reached[i] = keep * self.reached[i] + weight * (i <= num_accepted)
            self.accepted[i] = keep * self.accepted[i] + weight * (i < num_accepted)

    @property
    def acceptance_length(self) -> float | None:
        """τ, the bonus token included."""
        return 1 + self.num_accepted / self.num_drafts if self.num_drafts else None

    @property
    def per_position_rates(self) -> list[float | None]:
        """Accepted at i / drafted at i."""
        return _shares(self.accepted, self.drafted)

    @property
    def conditional_rates(self) -> list[float | None]:
        """Accepted at i / reached i."""
        return _shares(self.accepted, self.reached)

    @property
    def full_length(self) -> float:
        """τ at the full width, whatever the widths of the drafts were; what was never reached counts as rejected."""
        return expected_length(rate or 0.0 for rate in self.conditional_rates)


def _shares(parts: Sequence[float], wholes: Sequence[float]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]
