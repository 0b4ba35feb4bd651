"""What the heads' modules share: the draft vocabulary, the loss on the target's distribution, greedy drafting.

An architecture says in ``outputs`` what it computes at each draft position; everything below follows from that.
Shapes: B rows, T tokens, Q anchors, H width, V draft vocabulary, P learnable positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.heads import DraftInputs, FeatureBatch, LossOutput
from draft_training.loss import DraftLoss, chunk_rows
from draft_training.padding import padded_length
from draft_training.recipe import Objective
from draft_training.target_model import TargetModel

Outputs = Iterator[tuple[Tensor, Tensor]]


def places(mask: Tensor) -> tuple[Tensor, int]:
    """Flat indices of what ``mask`` holds, filled up with 0 to a ``padded_length``, and how many are real."""
    indices = mask.flatten().nonzero()[:, 0]
    return F.pad(indices, (0, padded_length(len(indices)) - len(indices))), len(indices)


class DraftModule(nn.Module):
    """Base of the heads; see ``DraftHead`` for what its methods promise."""

    draft_token_ids: Tensor
    draft_id_of_target: Tensor
    teacher_VH: Tensor

    def __init__(
        self, target: TargetModel, draft_token_ids: Tensor, aux_layer_ids: list[int], num_speculative_tokens: int
    ) -> None:
        super().__init__()
        self.aux_layer_ids = aux_layer_ids
        self.num_speculative_tokens = num_speculative_tokens
        self.draft_vocab_size = len(draft_token_ids)
        # Not the head's own: kept out of parameters() and of the exported file.
        teacher = target.lm_head_weight.detach()
        whole = self.draft_vocab_size == len(teacher)
        self.register_buffer("draft_token_ids", draft_token_ids, persistent=False)
        self.register_buffer("teacher_VH", (teacher if whole else teacher[draft_token_ids]).float(), persistent=False)
        to_draft = torch.full((len(teacher),), -1, dtype=torch.long)
        to_draft[draft_token_ids] = torch.arange(self.draft_vocab_size)
        self.register_buffer("draft_id_of_target", to_draft, persistent=False)

    def outputs(self, inputs: DraftInputs, own_drafts: bool = False) -> Outputs:
        """See ``DraftHead.outputs``."""
        raise NotImplementedError

    def greedy(self, states: Tensor, weight_VH: Tensor) -> Tensor:
        """Target ids [...] of the best draft tokens of ``states`` [..., H]."""
        chunks = states.flatten(0, -2).split(chunk_rows(len(weight_VH)))
        best = torch.cat([(chunk @ weight_VH.T).argmax(-1) for chunk in chunks])
        return self.draft_token_ids[best].view(states.shape[:-1])

    def count_targets(self, batch: FeatureBatch) -> Tensor:
        """See ``DraftHead.count_targets``."""
        learnable_BT = self._learnable(batch)
        seen_KBQ = torch.stack([batch.anchors_BQ + 1 + j for j in range(self.num_speculative_tokens)])
        exists_KBQ = batch.anchor_mask_BQ & (seen_KBQ < batch.ends_BT.gather(1, batch.anchors_BQ))
        index_KBQ = seen_KBQ.clamp(max=learnable_BT.shape[1] - 1)
        supervised_KBQ = exists_KBQ & learnable_BT.expand(len(index_KBQ), -1, -1).gather(2, index_KBQ)
        return torch.stack([supervised_KBQ, exists_KBQ]).sum((2, 3))

    def compute_loss(self, batch: FeatureBatch, objective: Objective) -> LossOutput:
        """The weighted mean loss of each draft position, added up.

        Position j weighs ``step_decay ** j`` or, with position weights "survival", on each anchor the probability that
        a server which drafts greedily still accepts at j: the product of p at the drafts before it, each one raised to
        ``floor + (1 - floor) * p``. That is the cumulative-confidence half of D-PACE (arXiv 2605.18810, eq. 7 and
        8) with the target's own probabilities; the continuation half needs the later positions first.
        """
        return self._chain_loss(batch, self.outputs(batch), objective)

    def _chain_loss(self, batch: FeatureBatch, outputs: Outputs, objective: Objective) -> LossOutput:
        learnable_BT = self._learnable(batch)
        counts_2K = self.count_targets(batch) if batch.step_counts_2K is None else batch.step_counts_2K
        divisors = counts_2K[0].clamp(min=1).tolist()
        rank_BT = learnable_BT.flatten().cumsum(0).view_as(learnable_BT) - 1
        places_P, _ = places(learnable_BT)
        teacher_logits = batch.final_hidden_BTH.flatten(0, 1)[places_P] @ self.teacher_VH.T
        probs_PV = teacher_logits.float().sub_(batch.logsumexp_BT.flatten()[places_P, None]).exp_()
        last, ends_BQ = batch.input_ids_BT.shape[1] - 1, batch.ends_BT.gather(1, batch.anchors_BQ)
        loss = batch.final_hidden_BTH.new_zeros(())
        num_targets, num_correct = [], []
        survives = objective.position_weights == "survival"
        weight_BQ = torch.ones_like(batch.anchors_BQ, dtype=torch.float32)
        for j, (states_BQH, weight_VH) in enumerate(outputs):
            seen_BQ = (batch.anchors_BQ + 1 + j).clamp(max=last)  # the target's token after it is the label
            exists_BQ = batch.anchor_mask_BQ & (batch.anchors_BQ + 1 + j < ends_BQ)
            reached_BQ = exists_BQ & learnable_BT.gather(1, seen_BQ)
            places_N, num_reached = places(reached_BQ)
            ranks_N = rank_BT.gather(1, seen_BQ).flatten()[places_N].clamp(min=0)
            weights_N = weight_BQ.flatten()[places_N] / divisors[j]
            weights_N[num_reached:] = 0
            states_NH = states_BQH.flatten(0, 1)[places_N]
            step_loss, *found = DraftLoss.apply(states_NH, weight_VH, probs_PV, ranks_N, weights_N, objective)
            best, accepted = (part[:num_reached] for part in found)
            loss = loss + step_loss
            if survives:  # what can't be drafted is never accepted
                rate_BQ = torch.zeros_like(weight_BQ).masked_scatter_(reached_BQ, accepted)
                weight_BQ = weight_BQ * (objective.survival_floor + (1 - objective.survival_floor) * rate_BQ)
            else:
                weight_BQ = weight_BQ * objective.step_decay
            wanted = batch.argmax_BT.gather(1, seen_BQ)[reached_BQ]
            num_targets.append(num_reached)
            num_correct.append(int((self.draft_token_ids[best] == wanted).sum()))
        return LossOutput(loss=loss, num_targets=num_targets, num_correct=num_correct)

    def _learnable(self, batch: FeatureBatch) -> Tensor:
        """[B, T]: a position s is worth learning when token s + 1 belongs to the completion and the head can say it."""
        return F.pad(batch.loss_mask_BT[:, 1:], (0, 1)) & (self.draft_id_of_target[batch.argmax_BT] >= 0)

    @torch.no_grad()
    def draft_along(self, batch: FeatureBatch) -> Tensor:
        """See ``DraftHead.draft_along``."""
        return torch.stack([self.greedy(*output) for output in self.outputs(batch)], dim=-1)

    @torch.no_grad()
    def propose(self, aux_hidden_TAH: Tensor, final_hidden_TH: Tensor, input_ids: Tensor) -> list[int]:
        """See ``DraftHead.propose``."""
        inputs = DraftInputs(
            input_ids_BT=input_ids[None],
            anchors_BQ=torch.tensor([[len(final_hidden_TH) - 1]], device=final_hidden_TH.device),
            positions_BT=torch.arange(len(final_hidden_TH), device=final_hidden_TH.device)[None],
            starts_BT=torch.zeros(1, len(final_hidden_TH), dtype=torch.long, device=final_hidden_TH.device),
            aux_hidden_BTAH=aux_hidden_TAH[None],
            final_hidden_BTH=final_hidden_TH[None],
        )
        return [int(self.greedy(*output)) for output in self.outputs(inputs, own_drafts=True)]

    def parameter_groups(self, learning_rate: float, lm_head_lr_scale: float, weight_decay: float) -> list[dict]:
        """Matrices decay, vectors don't; an lm_head starts from the target's rows and may want smaller steps, or with
        a scale of 0 none: it is frozen then, and its gradient isn't computed."""
        named = list(self.named_parameters())
        lm_heads = [p for name, p in named if name.startswith("lm_head")]
        matrices = [p for name, p in named if p.ndim == 2 and not name.startswith("lm_head")]
        vectors = [p for _, p in named if p.ndim == 1]
        for parameter in lm_heads:
            parameter.requires_grad_(lm_head_lr_scale > 0)
        groups: list[dict[str, Any]] = [
            {"kind": "matrix", "params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"kind": "vector", "params": vectors, "lr": learning_rate, "weight_decay": 0.0},
            {"kind": "lm_head", "params": lm_heads, "lr": learning_rate * lm_head_lr_scale, "weight_decay": 0.0},
        ]
        return [group for group in groups if any(p.requires_grad for p in group["params"])]
