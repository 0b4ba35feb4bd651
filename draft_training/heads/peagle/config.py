"""P-EAGLE's own knobs (``head.options``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from draft_training.heads import resolve_aux_layers, resolve_draft_vocab


@dataclass(kw_only=True, slots=True)
class PEagleOptions:
    """The paper's values are in the README beside this file."""

    draft_vocab_size: int = 8192  # most frequent completion tokens; at most the target's vocabulary
    draft_vocab_coverage: float | None = None  # instead of the size: the share of completion tokens, such as 0.99
    num_layers: int = 2
    aux_layer_ids: list[int] = field(default_factory=list)  # empty: low, middle, high = 2, n // 2, n - 3
    intermediate_size: int | None = None  # None: the target's
    mask_token_id: int | None = None  # whose embedding stands for an unknown token; None: the target's end of sequence
    norm_before_residual: bool = True
    norm_before_fc: bool = True

    def resolve_aux_layer_ids(self, num_hidden_layers: int) -> list[int]:
        """See ``resolve_aux_layers``."""
        return resolve_aux_layers(self.aux_layer_ids, num_hidden_layers)

    def resolve_draft_vocab_size(self, vocab_size: int, token_counts: Counter[int]) -> int:
        """See ``resolve_draft_vocab``."""
        return resolve_draft_vocab(self.draft_vocab_size, self.draft_vocab_coverage, vocab_size, token_counts)
