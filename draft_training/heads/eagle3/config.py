"""EAGLE-3's own knobs (``head.options``)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class Eagle3Options:
    """Defaults are what won here; the paper's values are in the README beside this file."""

    draft_vocab_size: int = 8192  # most frequent completion tokens; at most the target's vocabulary
    aux_layer_ids: list[int] = field(default_factory=list)  # empty: low, middle, high = 2, n // 2, n - 3
    intermediate_size: int | None = None  # None: the target's
    norm_before_residual: bool = True
    norm_before_fc: bool = True  # the EAGLE-3.1 input norm
    norm_output: bool = True  # feed back the normed output, EAGLE-3.1

    def resolve_aux_layer_ids(self, num_hidden_layers: int) -> list[int]:
        """Ascending ids; id k is the residual stream after k layers (vLLM and HF ``hidden_states[k]`` agree).

        Raises:
            ValueError: an id outside 1 .. n - 1, or out of order.
        """
        n = num_hidden_layers
        ids = self.aux_layer_ids or sorted({min(2, n - 1), n // 2, max(1, n - 3)})
        if ids != sorted(set(ids)) or ids[0] < 1 or ids[-1] >= n:
            raise ValueError(f"aux_layer_ids {ids} must ascend within 1 .. {n - 1}")
        return ids
