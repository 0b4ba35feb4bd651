"""Top-p without sorting the vocabulary: vLLM's own result from the few largest logits, where they decide it.

vLLM 0.32 sorts every row of logits on CPU, which takes longer than all else about sampling (``experiments/
sampling_cost``). The nucleus is mostly a few tokens. A row is settled by its ``NUM_CANDIDATES`` largest logits when the
cut lies inside of them, between two different logits, and farther from ``p`` than rounding reaches; every other row
goes to vLLM's function. So the set of kept tokens is the same, and with it what is sampled.
"""

from __future__ import annotations

import functools
from typing import Any

NUM_CANDIDATES = 256
FLOAT32_ULP = 2.0**-23
OWN_ERROR = 16 * FLOAT32_ULP  # of the mass computed here: two exponentials, a division, sums in pairs or in float64


def without_sort(apply_top_k_top_p: Any) -> Any:
    """vLLM's ``apply_top_k_top_p_pytorch``, called for rows only that the largest logits don't settle.

    The wrapped function takes and returns float32 logits [rows, vocab], -inf outside of what is kept, in place.
    """

    @functools.wraps(apply_top_k_top_p)
    def apply(logits: Any, k: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if p is None or k is not None or logits.shape[-1] <= NUM_CANDIDATES or logits.dtype != torch.float32:
            return apply_top_k_top_p(logits, k, p, *args, **kwargs)
        least_kept, settled = nucleus_edge(logits, p)
        if settled.all():
            return logits.masked_fill_(logits < least_kept.unsqueeze(1), -float("inf"))
        rest = (~settled).nonzero().squeeze(1)
        sorted_rows = apply_top_k_top_p(logits[rest], None, p[rest], *args, **kwargs)
        least_kept[rest] = -float("inf")
        logits.masked_fill_(logits < least_kept.unsqueeze(1), -float("inf"))
        return logits.index_copy_(0, rest, sorted_rows)

    return apply


def nucleus_edge(logits: Any, p: Any) -> tuple[Any, Any]:
    """The least logit [rows] that top-p keeps, and whether this is certain [rows]; NaN is never certain.

    vLLM drops a token when the mass of all tokens up to it, ascending, is at most 1 - p. That mass is here 1 less the
    mass above the token. vLLM divides by a float32 sum over the row that runs in at least four lanes, so its masses are
    off by at most a factor of 1 ± vocab / 4 ulps, halved by rounding to nearest.
    """
    top = logits.topk(NUM_CANDIDATES, dim=-1).values
    total = (logits - top[:, :1]).exp_().sum(-1, keepdim=True)
    probabilities = (top - top[:, :1]).exp_() / total
    mass_up_to = 1 - (probabilities.cumsum(-1) - probabilities)
    cut = (1 - p).unsqueeze(1)
    tolerance = logits.shape[-1] / 8 * FLOAT32_ULP * cut + OWN_ERROR
    kept = mass_up_to > cut
    kept[:, 0] = True
    last = kept.sum(-1, keepdim=True) - 1
    least_kept = top.gather(1, last)
    next_lower = top.gather(1, (last + 1).clamp_(max=NUM_CANDIDATES - 1))
    certain = ((mass_up_to - cut).abs() > tolerance)[:, 1:].all(-1)
    settled = certain & (least_kept > next_lower).squeeze(1)  # at the last candidate the two are one
    return least_kept.squeeze(1), settled
