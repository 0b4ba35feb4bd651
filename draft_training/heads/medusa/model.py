"""The Medusa module, numerically what vLLM's Medusa computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.draft_module import DraftModule, Outputs
from draft_training.heads import DraftInputs
from draft_training.heads.medusa.config import MedusaOptions
from draft_training.heads.medusa.export import export_head
from draft_training.layers import gather_anchors
from draft_training.target_model import TargetModel


class ResidualBlock(nn.Module):
    """``x + SiLU(W x + b)``, some times over; zero weights pass x on."""

    def __init__(self, hidden_size: int, num_layers: int, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(num_layers)])

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = states + F.silu(layer(states))
        return states


class MedusaHead(DraftModule):
    """K blocks over the anchor's hidden state; block j guesses token t + 2 + j and sees nothing after token t."""

    def __init__(
        self, target: TargetModel, draft_token_ids: Tensor, options: MedusaOptions, num_speculative_tokens: int
    ) -> None:
        super().__init__(target, draft_token_ids, [], num_speculative_tokens)
        self.options = options
        self.hidden_size, self.vocab_size = int(target.config.hidden_size), int(target.config.vocab_size)
        self.blocks = nn.ModuleList(
            [
                ResidualBlock(self.hidden_size, options.num_layers, options.fc_bias)
                for _ in range(num_speculative_tokens)
            ]
        )

        def output_layer() -> nn.Linear:
            return nn.Linear(self.hidden_size, self.draft_vocab_size, bias=False)

        if options.lm_head == "shared":
            self.lm_head = output_layer()
        elif options.lm_head == "own":
            self.lm_heads = nn.ModuleList([output_layer() for _ in range(num_speculative_tokens)])

    def output_weight(self, position: int) -> Tensor:
        """[V, H] of a draft position."""
        if self.options.lm_head == "target":
            return self.teacher_VH
        return (self.lm_head if self.options.lm_head == "shared" else self.lm_heads[position]).weight

    def outputs(self, inputs: DraftInputs, own_drafts: bool = False) -> Outputs:
        """See ``DraftHead.outputs``: no position reads a draft, whoever's it is."""
        hidden_BQH = gather_anchors(inputs.final_hidden_BTH, inputs.anchors_BQ)
        for j, block in enumerate(self.blocks):
            yield block(hidden_BQH), self.output_weight(j)

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """See ``DraftHead.export``."""
        export_head(self, directory, dtype)


def build(
    target: TargetModel, draft_token_ids: Tensor, options: MedusaOptions, num_speculative_tokens: int
) -> MedusaHead:
    """Heads that start as the target's own prediction of the next token."""
    head = MedusaHead(target, draft_token_ids, options, num_speculative_tokens)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(head.teacher_VH) if name.startswith("lm_head") else parameter.zero_()
    return head
