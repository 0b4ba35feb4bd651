"""The EAGLE-3 module, numerically what vLLM's Eagle3LlamaForCausalLM computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draft_training.chain import ChainModule
from draft_training.export import draft_map, eagle3_config, parameters_in, write_head
from draft_training.heads import DraftInputs
from draft_training.heads.eagle3.config import Eagle3Options
from draft_training.layers import FeatureFusion, FusedFeatureLayer, init_layers, layer_config
from draft_training.target_model import TargetModel


class Eagle3Head(ChainModule, FeatureFusion):
    """fc over the tapped features, one layer, a draft-vocabulary lm_head; embeddings are the target's, frozen."""

    def __init__(self, config: Any, target: TargetModel, draft_token_ids: Tensor, num_speculative_tokens: int) -> None:
        aux_layer_ids = list(config.eagle_aux_hidden_state_layer_ids)
        super().__init__(config, target, draft_token_ids, aux_layer_ids, num_speculative_tokens)
        self.add_fusion(config)
        self.layers = nn.ModuleList([FusedFeatureLayer(config)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False)

    def features(self, inputs: DraftInputs) -> Tensor:
        """See ``ChainModule.features``."""
        return self.fuse(inputs.aux_hidden_BTAH.flatten(-2))

    def layer_inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ChainModule.layer_inputs``."""
        return self.layers[0].inputs(embeds, hidden)

    def finish(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ChainModule.finish``."""
        normed = self.norm(residual)
        return normed, normed if self.config.norm_output else residual

    @property
    def output_weight(self) -> Tensor:
        """See ``ChainModule.output_weight``."""
        return self.lm_head.weight

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """See ``DraftHead.export``."""
        tensors = {**parameters_in(self, dtype), **draft_map(self.draft_token_ids, self.config.vocab_size)}
        write_head(directory, eagle3_config(self.config, dtype, self.draft_vocab_size), tensors)


def build(
    target: TargetModel, draft_token_ids: Tensor, options: Eagle3Options, num_speculative_tokens: int
) -> Eagle3Head:
    """A head with random layers and the target's own rows as lm_head and final norm."""
    config = layer_config(target.config, "LlamaForCausalLMEagle3", 1, options.intermediate_size)
    config.update(
        {
            "eagle_aux_hidden_state_layer_ids": options.resolve_aux_layer_ids(target.config.num_hidden_layers),
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": options.norm_output,
        }
    )
    head = Eagle3Head(config, target, draft_token_ids, num_speculative_tokens)
    init_layers(head)
    with torch.no_grad():
        head.lm_head.weight.copy_(head.teacher_VH)
        head.norm.weight.copy_(target.final_norm_weight)
    return head
