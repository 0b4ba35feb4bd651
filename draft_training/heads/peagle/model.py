"""The P-EAGLE module, numerically what vLLM's Eagle3LlamaForCausalLM computes under ``parallel_drafting``.

Shapes: B rows, T tokens, Q anchors, H width. At an anchor t the layers read positions 0 .. t with true features, as
EAGLE-3 does, and behind them masks at positions t + 1 .. t + K - 1: the embedding of one fixed token beside one learnt
vector in place of the features. Attention is causal throughout, so mask m sees masks 1 .. m of its own anchor.
Position t drafts token t + 2, mask m token t + 2 + m.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draft_training.draft_module import DraftModule, Outputs
from draft_training.export import draft_map, eagle3_config, parameters_in, write_head
from draft_training.heads import DraftInputs
from draft_training.heads.peagle.config import PEagleOptions
from draft_training.layers import (
    DecoderLayer,
    FeatureFusion,
    FusedFeatureLayer,
    Stretch,
    gather_anchors,
    init_layers,
    layer_config,
)
from draft_training.target_model import TargetModel


class InnerLayer(DecoderLayer):
    """A layer after the first: it reads the residual stream alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.hidden_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class PEagleHead(DraftModule, FeatureFusion):
    """fc over the tapped features, some layers, a draft-vocabulary lm_head; embeddings are the target's, frozen."""

    embed_VH: Tensor

    def __init__(self, config: Any, target: TargetModel, draft_token_ids: Tensor, num_speculative_tokens: int) -> None:
        super().__init__(target, draft_token_ids, list(config.eagle_aux_hidden_state_layer_ids), num_speculative_tokens)
        self.config = config
        self.register_buffer("embed_VH", target.embedding.detach(), persistent=False)  # the same memory
        self.add_fusion(config)
        self.mask_hidden = nn.Parameter(torch.zeros(self.fc.in_features))  # in the space of the tapped features
        inner = [InnerLayer(config) for _ in range(config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList([FusedFeatureLayer(config), *inner])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False)

    def _layer_inputs(self, index: int, states: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Attention input and residual stream of a layer; the first one reads (embeddings, features)."""
        layer: Any = self.layers[index]
        return layer.inputs(*states) if index == 0 else (layer.input_layernorm(*states), *states)

    def outputs(self, inputs: DraftInputs, own_drafts: bool = False) -> Outputs:
        """See ``DraftHead.outputs``: only the first position reads a token after t, and it is no draft."""
        anchors_BQ, ids_BT = inputs.anchors_BQ, inputs.input_ids_BT
        indices_T = torch.arange(inputs.final_hidden_BTH.shape[1], device=anchors_BQ.device)
        next_ids = ids_BT[:, (indices_T + 1).clamp(max=ids_BT.shape[1] - 1)]
        positions_BQ = inputs.positions_BT.gather(1, anchors_BQ)
        fused = self.fuse(inputs.aux_hidden_BTAH.flatten(-2))
        known: tuple[Tensor, ...] = (F.embedding(next_ids, self.embed_VH).float(), fused)
        masks = self._mask_states(anchors_BQ)
        first: Any = self.layers[0]
        num_masks = self.num_speculative_tokens - 1
        stretches = first.self_attn.stretches(anchors_BQ, inputs.starts_BT, num_masks, fused.dtype)
        for index, layer in enumerate(self.layers):
            attention: Any = layer.self_attn
            reading, residual = self._layer_inputs(index, known)
            prefix = attention.key_value(reading, inputs.positions_BT)
            if index + 1 == len(self.layers):  # nothing reads the last layer's outputs but the anchors
                reading, residual = gather_anchors(reading, anchors_BQ), gather_anchors(residual, anchors_BQ)
                attended = attention(attention.query(reading, positions_BQ), prefix, [], stretches)
            else:
                attended = attention.causal(attention.query(reading, inputs.positions_BT), prefix, inputs.starts_BT)
            known = (layer.outputs(attended, residual),)
            masks = self._mask_layer(index, masks, prefix, positions_BQ, stretches)
        yield self.norm(known[0]), self.lm_head.weight
        for (states_BQH,) in masks:
            yield self.norm(states_BQH), self.lm_head.weight

    def _mask_states(self, anchors_BQ: Tensor) -> list[tuple[Tensor, ...]]:
        """What the first layer reads at each mask: the same everywhere, positions aside."""
        embed = self.embed_VH[self.config.ptd_token_id].float().expand(*anchors_BQ.shape, -1)
        hidden = self.fuse(self.mask_hidden).expand(*anchors_BQ.shape, -1)
        return [(embed, hidden)] * (self.num_speculative_tokens - 1)

    def _mask_layer(
        self,
        index: int,
        masks: list[tuple[Tensor, ...]],
        prefix: tuple[Tensor, Tensor],
        positions_BQ: Tensor,
        stretches: list[Stretch],
    ) -> list[tuple[Tensor, ...]]:
        """One layer over the masks of every anchor."""
        layer: Any = self.layers[index]
        own: list[tuple[Tensor, Tensor]] = []
        after: list[tuple[Tensor, ...]] = []
        for m, states in enumerate(masks, start=1):
            reading, residual = self._layer_inputs(index, states)
            own.append(layer.self_attn.key_value(reading, positions_BQ + m))
            attended = layer.self_attn(layer.self_attn.query(reading, positions_BQ + m), prefix, own, stretches)
            after.append((layer.outputs(attended, residual),))
        return after

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """See ``DraftHead.export``."""
        config = eagle3_config(self.config, dtype, self.draft_vocab_size)
        tensors = {**parameters_in(self, dtype), **draft_map(self.draft_token_ids, self.config.vocab_size)}
        write_head(directory, {**config, "ptd_token_id": self.config.ptd_token_id}, tensors)


def build(
    target: TargetModel, draft_token_ids: Tensor, options: PEagleOptions, num_speculative_tokens: int
) -> PEagleHead:
    """A head with random layers and the target's own rows as lm_head and final norm.

    Raises:
        ValueError: the mask token lies outside the target's vocabulary.
    """
    config = layer_config(target.config, "LlamaForCausalLMEagle3", options.num_layers, options.intermediate_size)
    mask_token_id = options.mask_token_id if options.mask_token_id is not None else _end_of_sequence(config)
    if not 0 <= mask_token_id < config.vocab_size:
        raise ValueError(f"head.options.mask_token_id is {mask_token_id}; give an id from 0 to {config.vocab_size - 1}")
    config.update(
        {
            "eagle_aux_hidden_state_layer_ids": options.resolve_aux_layer_ids(target.config.num_hidden_layers),
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": False,  # says what is fed back, and nothing is
            "ptd_token_id": mask_token_id,
        }
    )
    head = PEagleHead(config, target, draft_token_ids, num_speculative_tokens)
    init_layers(head)
    with torch.no_grad():
        nn.init.normal_(head.mask_hidden)
        head.lm_head.weight.copy_(head.teacher_VH)
        head.norm.weight.copy_(target.final_norm_weight)
    return head


def _end_of_sequence(config: Any) -> int:
    ids = config.eos_token_id
    first = ids[0] if isinstance(ids, list) else ids
    return 0 if first is None else int(first)
