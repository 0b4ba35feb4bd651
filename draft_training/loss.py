"""Soft cross-entropy against the target's distribution, with its gradient made in the forward pass.

The logits of N anchors over V draft tokens are the largest tensors of training. Computing them, the loss and both
gradients in one place keeps one buffer of at most ``CHUNK_LOGITS`` entries alive instead of autograd's five [N, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**25


def chunk_rows(vocab_size: int) -> int:
    """How many rows of logits fit one buffer."""
    return max(1, CHUNK_LOGITS // vocab_size)


class SoftCrossEntropy(torch.autograd.Function):
    """``sum_n w_n * (S_n * logsumexp(z_n) - p_n . z_n)`` with ``z = hidden @ weight.T`` and ``S = sum_v p``.

    ``p_n``, row ``ranks[n]`` of ``probs``, holds the target's *full-vocabulary* probabilities at the draft tokens, not
    renormalised: what lies outside the draft vocabulary pulls no weight. Returns (loss, argmax ids [N]).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, probs_PV: Tensor, ranks_N: Tensor, weights_N: Tensor
    ) -> Any:
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        best, grad_hidden = [], []
        grad_weight_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        rows = chunk_rows(len(weight_VH))
        for hidden_nH, ranks_n, weights_n in zip(
            hidden_NH.split(rows), ranks_N.split(rows), weights_N.split(rows), strict=True
        ):
            probs_nV = probs_PV[ranks_n]
            logits_nV = (hidden_nH @ weight_VH.T).float()
            best.append(logits_nV.argmax(-1))
            mass_n = probs_nV.sum(-1)
            logsumexp_n = torch.logsumexp(logits_nV, -1)
            cross_n = torch.einsum("nv,nv->n", probs_nV, logits_nV)
            loss += (weights_n * (mass_n * logsumexp_n - cross_n)).sum()
            grad_nV = logits_nV.sub_(logsumexp_n[:, None]).exp_().mul_(mass_n[:, None])
            grad_nV = grad_nV.sub_(probs_nV).mul_(weights_n[:, None]).to(hidden_NH.dtype)
            grad_hidden.append(grad_nV @ weight_VH)
            if grad_weight_VH is not None:
                grad_weight_VH += grad_nV.T @ hidden_nH
        best_N = torch.cat(best)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight_VH)
        ctx.mark_non_differentiable(best_N)
        return loss, best_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_best: Any) -> Any:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scaled = None if grad_weight_VH is None else grad_weight_VH * grad_loss
        return grad_hidden_NH * grad_loss, scaled, None, None, None
