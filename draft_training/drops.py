"""What was left out and why: a count and the first examples of each reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 3


@dataclass(slots=True)
class Drops:
    """Dropped rows by reason; ``num_seen`` counts kept ones too."""

    num_seen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, row_id: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(row_id)

    def summary(self) -> str:
        """One line."""
        reasons = sorted(self.counts.items(), key=lambda item: -item[1])
        listed = "; ".join(f"{count} {reason} (e.g. {self.examples[reason][0]})" for reason, count in reasons)
        return f"dropped {sum(self.counts.values())} of {self.num_seen} rows" + (f": {listed}" if listed else "")

    def log(self) -> None:
        """The summary, as a warning when something was dropped."""
        logger.log(logging.WARNING if self.counts else logging.INFO, "%s", self.summary())

    def to_dict(self) -> dict[str, Any]:
        """For the data card."""
        return {
            reason: {"rows": count, "examples": self.examples[reason]} for reason, count in sorted(self.counts.items())
        }
