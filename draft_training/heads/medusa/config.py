"""Medusa's own knobs (``head.options``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from draft_training.heads import resolve_draft_vocab

LM_HEADS = ("shared", "target", "own")


@dataclass(kw_only=True, slots=True)
class MedusaOptions:
    """The paper's values are in the README beside this file."""

    num_layers: int = 1  # residual layers a head
    fc_bias: bool = True
    lm_head: str = "shared"  # shared: one, trained | target: the target's, frozen | own: one a head, trained
    draft_vocab_size: int = 8192  # most frequent completion tokens; with lm_head "own" always the whole vocabulary
    draft_vocab_coverage: float | None = None  # instead of the size: the share of completion tokens, such as 0.99

    def resolve_aux_layer_ids(self, num_hidden_layers: int) -> list[int]:
        """None: the heads read what follows the target's final norm."""
        return []

    def resolve_draft_vocab_size(self, vocab_size: int, token_counts: Counter[int]) -> int:
        """See ``resolve_draft_vocab``.

        Raises:
            ValueError: ``lm_head`` is not one of the three.
        """
        if self.lm_head not in LM_HEADS:
            raise ValueError(f"head.options.lm_head must be one of {', '.join(LM_HEADS)}; got {self.lm_head!r}")
        if self.lm_head == "own":
            return vocab_size
        return resolve_draft_vocab(self.draft_vocab_size, self.draft_vocab_coverage, vocab_size, token_counts)
