"""Medusa's own knobs (``head.options``)."""

from __future__ import annotations

from dataclasses import dataclass

LM_HEADS = ("shared", "target", "own")


@dataclass(kw_only=True, slots=True)
class MedusaOptions:
    """The paper's values are in the README beside this file."""

    num_layers: int = 1  # residual layers a head
    fc_bias: bool = True
    lm_head: str = "shared"  # shared: one, trained | target: the target's, frozen | own: one a head, trained
    draft_vocab_size: int = 8192  # most frequent completion tokens; with lm_head "own" always the whole vocabulary

    def resolve_aux_layer_ids(self, num_hidden_layers: int) -> list[int]:
        """None: the heads read what follows the target's final norm."""
        return []

    def resolve_draft_vocab_size(self, vocab_size: int) -> int:
        """At most the target's vocabulary.

        Raises:
            ValueError: ``lm_head`` is not one of the three.
        """
        if self.lm_head not in LM_HEADS:
            raise ValueError(f"head.options.lm_head must be one of {', '.join(LM_HEADS)}; got {self.lm_head!r}")
        return vocab_size if self.lm_head == "own" else min(self.draft_vocab_size, vocab_size)
