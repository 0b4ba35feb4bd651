"""Heads that draft one token after another, each on their own output: EAGLE-1 and EAGLE-3.

Everything is indexed by *anchor* t: draft position j of anchor t reads token t + 1 + j, sits at rope position t + j
and drafts token t + 2 + j. Indexed so, all draft positions share one causal mask and the feedback needs no shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.draft_module import DraftModule, Outputs
from draft_training.heads import DraftInputs
from draft_training.layers import gather_anchors
from draft_training.target_model import TargetModel


class ChainModule(DraftModule):
    """One decoder layer, unrolled K times on its own output (training-time test, EAGLE-3 §3.2)."""

    layers: nn.ModuleList
    embed_VH: Tensor

    def __init__(
        self,
        config: Any,
        target: TargetModel,
        draft_token_ids: Tensor,
        aux_layer_ids: list[int],
        num_speculative_tokens: int,
    ) -> None:
        super().__init__(target, draft_token_ids, aux_layer_ids, num_speculative_tokens)
        self.config = config
        self.register_buffer("embed_VH", target.embedding.detach(), persistent=False)  # the same memory

    def features(self, inputs: DraftInputs) -> Tensor:
        """[B, T, H]: what the layer reads beside the embeddings at true positions."""
        raise NotImplementedError

    def layer_inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Attention input [..., W] and the residual stream [..., H]."""
        raise NotImplementedError

    def finish(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of the residual stream after the layer: the states that make logits, and the features fed back."""
        raise NotImplementedError

    @property
    def output_weight(self) -> Tensor:
        """[V, H], makes logits of states."""
        raise NotImplementedError

    def outputs(self, inputs: DraftInputs, own_drafts: bool = False) -> Outputs:
        """See ``DraftHead.outputs``. Only keys and values are computed where there is no anchor."""
        layer: Any = self.layers[0]
        anchors_BQ, ids_BT = inputs.anchors_BQ, inputs.input_ids_BT
        last = ids_BT.shape[1] - 1
        indices_T = torch.arange(inputs.final_hidden_BTH.shape[1], device=anchors_BQ.device)
        next_ids = ids_BT[:, (indices_T + 1).clamp(max=last)]
        everywhere, residual = self.layer_inputs(F.embedding(next_ids, self.embed_VH).float(), self.features(inputs))
        prefix = layer.self_attn.key_value(everywhere, inputs.positions_BT)
        num_own = self.num_speculative_tokens - 1
        stretches = layer.self_attn.stretches(anchors_BQ, inputs.starts_BT, num_own, residual.dtype)
        positions_BQ = inputs.positions_BT.gather(1, anchors_BQ)
        attending, residual = gather_anchors(everywhere, anchors_BQ), gather_anchors(residual, anchors_BQ)
        own: list[tuple[Tensor, Tensor]] = []
        hidden = drafted = torch.empty(0)  # set by the first pass
        for j in range(self.num_speculative_tokens):
            if j:
                tokens_BQ = drafted if own_drafts else ids_BT.gather(1, (anchors_BQ + 1 + j).clamp(max=last))
                attending, residual = self.layer_inputs(F.embedding(tokens_BQ, self.embed_VH).float(), hidden)
                own.append(layer.self_attn.key_value(attending, positions_BQ + j))
            attended = layer.self_attn(layer.self_attn.query(attending, positions_BQ + j), prefix, own, stretches)
            states, hidden = self.finish(layer.outputs(attended, residual))
            yield states, self.output_weight
            if own_drafts:
                drafted = self.greedy(states, self.output_weight)
