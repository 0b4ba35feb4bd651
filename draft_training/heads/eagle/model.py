"""The EAGLE-1 module, numerically what vLLM's EagleLlamaForCausalLM computes.

No norm before attention and none at the end: the residual stream itself stands for the target's normed hidden state,
makes the logits through the target's frozen output layer, and is fed back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.chain import ChainModule
from draft_training.draft_module import Outputs
from draft_training.export import llama_config, parameters_in, write_head
from draft_training.heads import DraftInputs, FeatureBatch, LossOutput
from draft_training.heads.eagle.config import EagleOptions
from draft_training.layers import DecoderLayer, init_layers, layer_config
from draft_training.recipe import Objective
from draft_training.target_model import TargetModel


class EagleHead(ChainModule):
    """fc over [embedding; hidden state], one layer; embeddings and output layer are the target's, frozen."""

    def __init__(
        self, config: Any, target: TargetModel, draft_token_ids: Tensor, options: EagleOptions, num_drafts: int
    ) -> None:
        super().__init__(config, target, draft_token_ids, [], num_drafts)
        self.feature_loss_weight = options.feature_loss_weight
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)  # vLLM drops a bias
        self.layers = nn.ModuleList([DecoderLayer(config, config.hidden_size)])

    def features(self, inputs: DraftInputs) -> Tensor:
        """See ``ChainModule.features``."""
        return inputs.final_hidden_BTH

    def layer_inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ChainModule.layer_inputs``: attention reads the residual stream as it is."""
        fused = self.fc(torch.cat([embeds, hidden], dim=-1))
        return fused, fused

    def finish(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See ``ChainModule.finish``."""
        return residual, residual

    @property
    def output_weight(self) -> Tensor:
        """See ``ChainModule.output_weight``."""
        return self.teacher_VH

    def compute_loss(self, batch: FeatureBatch, objective: Objective) -> LossOutput:
        """See ``DraftHead.compute_loss``; and on demand the distance of position j's features from the target's at
        t + 1 + j, always weighted ``step_decay ** j``."""
        if not self.feature_loss_weight:
            return super().compute_loss(batch, objective)
        distances: list[Tensor] = []
        output = self._chain_loss(batch, self._compared(batch, objective.step_decay, distances), objective)
        output.loss = output.loss + self.feature_loss_weight * torch.stack(distances).sum()
        return output

    def _compared(self, batch: FeatureBatch, step_decay: float, distances: list[Tensor]) -> Outputs:
        """The outputs as they pass, each one's distance noted."""
        T = batch.final_hidden_BTH.shape[1]
        counts_2K = self.count_targets(batch) if batch.step_counts_2K is None else batch.step_counts_2K
        divisors = counts_2K[1].clamp(min=1).tolist()
        for j, (states_BQH, weight_VH) in enumerate(self.outputs(batch)):
            wanted_BQ = batch.anchors_BQ + 1 + j
            exists_BQ = batch.anchor_mask_BQ & (wanted_BQ < batch.ends_BT.gather(1, batch.anchors_BQ))
            index = wanted_BQ.clamp(max=T - 1)[:, :, None].expand_as(states_BQH)
            pairs = states_BQH[exists_BQ], batch.final_hidden_BTH.gather(1, index)[exists_BQ]
            total = F.smooth_l1_loss(*pairs, reduction="sum") / states_BQH.shape[-1]
            distances.append(step_decay**j / divisors[j] * total)
            yield states_BQH, weight_VH

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """See ``DraftHead.export``: no lm_head, no norm of input or output, or vLLM refuses or ignores them."""
        write_head(directory, llama_config(self.config, dtype), parameters_in(self, dtype))


def build(
    target: TargetModel, draft_token_ids: Tensor, options: EagleOptions, num_speculative_tokens: int
) -> EagleHead:
    """A head with random layers."""
    config = layer_config(target.config, "LlamaForCausalLM", 1, options.intermediate_size)
    head = EagleHead(config, target, draft_token_ids, options, num_speculative_tokens)
    init_layers(head)
    return head
