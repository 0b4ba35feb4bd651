"""Soft cross-entropy against the target's distribution, with its gradient made in the forward pass.

The logits of N anchors over V draft tokens are the largest tensors of training. Computing them, the loss and both
gradients in one place keeps one [N, V] buffer alive instead of autograd's five, and writes each value once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SoftCrossEntropy(torch.autograd.Function):
    """``sum_n w_n * (S_n * logsumexp(z_n) - p_n . z_n)`` with ``z = hidden @ weight.T`` and ``S = sum_v p``.

    ``p`` holds the target's *full-vocabulary* probabilities at the draft tokens, not renormalised: what lies
    outside the draft vocabulary pulls no weight. Returns (loss, argmax ids [N]).
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, probs_NV: Tensor, weights_N: Tensor) -> Any:
        logits_NV = (hidden_NH @ weight_VH.T).float()
        best_N = logits_NV.argmax(-1)
        mass_N = probs_NV.sum(-1)
        logsumexp_N = torch.logsumexp(logits_NV, -1)
        cross_N = torch.einsum("nv,nv->n", probs_NV, logits_NV)
        loss = (weights_N * (mass_N * logsumexp_N - cross_N)).sum()
        grad_NV = (
            logits_NV.sub_(logsumexp_N[:, None]).exp_().mul_(mass_N[:, None]).sub_(probs_NV).mul_(weights_N[:, None])
        )
        grad_NV = grad_NV.to(hidden_NH.dtype)
        ctx.save_for_backward(grad_NV @ weight_VH, grad_NV.T @ hidden_NH)
        ctx.mark_non_differentiable(best_N)
        return loss, best_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_best: Any) -> Any:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        return grad_hidden_NH * grad_loss, grad_weight_VH * grad_loss, None, None
