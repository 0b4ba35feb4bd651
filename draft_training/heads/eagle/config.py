"""EAGLE-1's own knobs (``head.options``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class EagleOptions:
    """The vocabulary is none of them: the target's output layer makes the logits, so every token can be drafted."""

    intermediate_size: int | None = None  # None: the target's
    feature_loss_weight: float = 0.0  # of the smooth L1 loss between the head's features and the target's

    def resolve_aux_layer_ids(self, num_hidden_layers: int) -> list[int]:
        """None: the layer reads what follows the target's final norm."""
        return []

    def resolve_draft_vocab_size(self, vocab_size: int, token_counts: Counter[int]) -> int:
        """The whole vocabulary."""
        return vocab_size
