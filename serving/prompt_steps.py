"""How often a step also reads prompts: so often with every K, so its time counts the more the wider drafts are.

Such a step verifies and drafts beside what it reads, and what it adds grows with K by half of what a decode step does
or more (measured, ``experiments/LOG.md``). And the sequence whose end made room left its place empty meanwhile. So each
counts as one more step of the same K without any token. Where answers are short and many are written at a time it is
half of all time; in long ones it is next to none. Pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_TOKENS, FIRST_TOKENS = 512, 64  # of each sequence: that count, and that count as without prompts at the start


@dataclass(slots=True)
class PromptSteps:
    """Of one batch size: steps that read prompts, each times its sequences, and output tokens, of the recent past."""

    steps: float = 0.0
    tokens: float = 0.0

    def observe(self, batch: int, num_tokens: int, reads_prompts: bool) -> None:
        """A step of ``batch`` sequences put out ``num_tokens``."""
        keep = max(0.0, 1 - num_tokens / (WINDOW_TOKENS * batch))
        self.tokens = keep * max(self.tokens, FIRST_TOKENS * batch) + num_tokens
        self.steps = keep * self.steps + batch * reads_prompts

    @property
    def per_token(self) -> float:
        """Steps in which a sequence waits for prompts, for each token that it puts out."""
        return self.steps / self.tokens if self.tokens else 0.0
