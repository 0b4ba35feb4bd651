"""What a draft position costs against the target's distribution, with its gradient made in the forward pass.

The logits of N anchors over V draft tokens are the largest tensors of training. Computing them, the loss and both
gradients in one place keeps a few buffers of at most ``CHUNK_LOGITS`` entries alive instead of autograd's many [N, V].

Throughout, p_n holds the target's *full-vocabulary* probabilities at the draft tokens, not renormalised: what lies
outside the draft vocabulary pulls no weight. S = sum_v p, q = softmax(z), and the overlap is a = sum_v min(p, q),
the probability that a token drawn from q is accepted (Leviathan et al., arXiv 2211.17192); a <= S.

=============  =========================================================================================
cross_entropy  ``S * logsumexp(z) - p . z``: the gradient of the forward KL divergence
lk_hybrid      ``l * cross_entropy + (1 - l) * (1 - a)`` with ``l = exp(-eta * a)``, no gradient through l
lk_log         ``l * cross_entropy + (1 - l) * -log a`` with the same l; a large eta leaves ``-log a`` alone
=============  =========================================================================================

The last two after *LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding* (Samarin et al., arXiv
2602.23881): 1 - a is the total variation distance, whose gradient vanishes where p and q hardly overlap, so the
divergence leads there. The paper's hybrid is ``lk_hybrid``, with eta 3; its other loss is ``-log a`` unblended.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draft_training.recipe import Objective

CHUNK_LOGITS = 2**25
MIN_OVERLAP = 1e-6  # keeps -log a and its gradient finite


def chunk_rows(vocab_size: int) -> int:
    """How many rows of logits fit one buffer."""
    return max(1, CHUNK_LOGITS // vocab_size)


def _cross_entropy(logits_nV: Tensor, probs_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [n], and its gradient by the logits in their own buffer."""
    mass_n = probs_nV.sum(-1)
    logsumexp_n = torch.logsumexp(logits_nV, -1)
    loss_n = mass_n * logsumexp_n - torch.einsum("nv,nv->n", probs_nV, logits_nV)
    grad_nV = logits_nV.sub_(logsumexp_n[:, None]).exp_().mul_(mass_n[:, None]).sub_(probs_nV)
    return loss_n, grad_nV


def _likelihood_blend(logits_nV: Tensor, probs_nV: Tensor, eta: float, is_log: bool) -> tuple[Tensor, Tensor]:
    """As ``_cross_entropy``, for ``lk_hybrid`` and ``lk_log``.

    With m = [q < p], the tokens of which more would be accepted: da / dz_k = q_k * (m_k - sum_v m_v q_v).
    """
    mass_n = probs_nV.sum(-1)
    logsumexp_n = torch.logsumexp(logits_nV, -1)
    cross_n = mass_n * logsumexp_n - torch.einsum("nv,nv->n", probs_nV, logits_nV)
    q_nV = logits_nV.sub_(logsumexp_n[:, None]).exp_()
    overlap_n = torch.minimum(probs_nV, q_nV).sum(-1).clamp_min(MIN_OVERLAP)
    short_nV = q_nV * (q_nV < probs_nV)
    short_n = short_nV.sum(-1)
    blend_n = torch.exp(-eta * overlap_n)
    gap_n = -overlap_n.log() if is_log else 1 - overlap_n
    pull_n = (1 - blend_n) / overlap_n if is_log else 1 - blend_n
    grad_nV = q_nV.mul_((blend_n * mass_n + pull_n * short_n)[:, None])
    grad_nV = grad_nV.addcmul_(probs_nV, blend_n[:, None], value=-1).sub_(short_nV.mul_(pull_n[:, None]))
    return blend_n * cross_n + (1 - blend_n) * gap_n, grad_nV


def _loss_and_gradient(logits_nV: Tensor, probs_nV: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    if objective.loss == "cross_entropy":
        return _cross_entropy(logits_nV, probs_nV)
    return _likelihood_blend(logits_nV, probs_nV, objective.lk_eta, objective.loss == "lk_log")


class DraftLoss(torch.autograd.Function):
    """``sum_n w_n * loss(z_n, p_n)`` with ``z = hidden @ weight.T`` and p_n row ``ranks[n]`` of ``probs``.

    Returns (loss, argmax ids [N], p at the argmax [N]): a server that drafts greedily accepts with that probability.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        probs_PV: Tensor,
        ranks_N: Tensor,
        weights_N: Tensor,
        objective: Objective,
    ) -> Any:
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        best, accepted, grad_hidden = [], [], []
        grad_weight_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        rows = chunk_rows(len(weight_VH))
        for hidden_nH, ranks_n, weights_n in zip(
            hidden_NH.split(rows), ranks_N.split(rows), weights_N.split(rows), strict=True
        ):
            probs_nV = probs_PV[ranks_n]
            logits_nV = (hidden_nH @ weight_VH.T).float()
            best.append(logits_nV.argmax(-1))
            accepted.append(probs_nV.gather(-1, best[-1][:, None])[:, 0])
            loss_n, grad_nV = _loss_and_gradient(logits_nV, probs_nV, objective)
            loss += (weights_n * loss_n).sum()
            grad_nV = grad_nV.mul_(weights_n[:, None]).to(hidden_NH.dtype)
            grad_hidden.append(grad_nV @ weight_VH)
            if grad_weight_VH is not None:
                grad_weight_VH += grad_nV.T @ hidden_nH
        best_N, accepted_N = torch.cat(best), torch.cat(accepted)
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight_VH)
        ctx.mark_non_differentiable(best_N, accepted_N)
        return loss, best_N, accepted_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_best: Any, _grad_accepted: Any) -> Any:
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        scaled = None if grad_weight_VH is None else grad_weight_VH * grad_loss
        return grad_hidden_NH * grad_loss, scaled, None, None, None, None
