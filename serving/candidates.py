"""Verification of sampled requests on CPU from the few tokens that top-p keeps.

vLLM 0.32 makes a whole row of probabilities for every draft token, and draws for each what would replace it. Rejection
sampling (Leviathan et al. 2023, algorithm 1) of drafts that were not sampled themselves asks for less: token d is
accepted with its probability p(d); what replaces the first that is not is drawn from p without d; and where all are
accepted one more token is drawn. Nearly always that concerns a row's candidates alone (``serving.nucleus``); a row that
they don't settle is sorted as vLLM does. What is not this plain case, seeds included, is left to vLLM.
"""

from __future__ import annotations

import functools
from typing import Any

from serving.nucleus import NUM_CANDIDATES, edge_among, largest_logits
from serving.verification import asks_nothing_else, is_idle


def by_candidates(forward: Any) -> Any:
    """``RejectionSampler.forward``, called only where a request asks for more than temperature and top-p."""

    @functools.wraps(forward)
    def verify(sampler: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        is_small = logits.shape[-1] <= NUM_CANDIDATES
        if draft_probs is not None or sampler.synthetic_mode or is_small or not is_top_p_alone(sampling_metadata):
            return forward(sampler, metadata, draft_probs, logits, sampling_metadata)
        from vllm.v1.outputs import SamplerOutput

        return SamplerOutput(sampled_token_ids=_verify(metadata, logits, sampling_metadata), logprobs_tensors=None)

    return verify


def is_top_p_alone(sampling_metadata: Any) -> bool:
    """Whether every request samples, without a seed, by temperature and top-p and nothing else."""
    return bool(
        sampling_metadata.all_random
        and sampling_metadata.top_p is not None
        and sampling_metadata.top_k is None
        and not sampling_metadata.generators
        and asks_nothing_else(sampling_metadata)
        and all(map(is_idle, sampling_metadata.logitsprocs.argmax_invariant))
    )


def _verify(metadata: Any, logits: Any, sampling_metadata: Any) -> Any:
    """Accepted tokens and the one that follows them [requests, longest draft + 1], -1 behind them."""
    import torch
    from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

    temperature, top_p = sampling_metadata.temperature, sampling_metadata.top_p
    lengths, drafts = torch.tensor(metadata.num_draft_tokens), metadata.draft_token_ids.long()
    starts = lengths.cumsum(0) - lengths
    request = torch.arange(len(lengths)).repeat_interleave(lengths)
    rows = Rows(logits[metadata.target_logits_indices], temperature[request], top_p[request])

    shape = len(lengths), metadata.max_spec_len + 1
    position = torch.arange(shape[1])
    is_draft = position < lengths.unsqueeze(1)
    is_accepted = torch.zeros(shape, dtype=torch.bool)
    is_accepted[is_draft] = torch.rand(len(drafts), dtype=torch.float64) < rows.probability(drafts)
    num_accepted = is_accepted.long().cumprod(1).sum(1)

    sampled = torch.full(shape, PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    sampled[is_draft] = drafts.int()
    sampled.masked_fill_(position >= num_accepted.unsqueeze(1), PLACEHOLDER_TOKEN_ID)
    rejecting = (num_accepted < lengths).nonzero().squeeze(1)
    first_rejected = starts[rejecting] + num_accepted[rejecting]
    sampled[rejecting, num_accepted[rejecting]] = rows.draw(first_rejected, without=drafts[first_rejected])
    rest = (num_accepted == lengths).nonzero().squeeze(1)
    if len(rest):
        bonus = Rows(logits[metadata.bonus_logits_indices[rest]], temperature[rest], top_p[rest])
        sampled[rest, lengths[rest]] = bonus.draw(torch.arange(len(rest)))
    return sampled


class Rows:
    """Distributions [rows, vocab] after temperature and top-p; of most rows only the tokens that are kept."""

    def __init__(self, logits: Any, temperature: Any, top_p: Any) -> None:
        """``logits`` are overwritten where they are float32."""
        import torch
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        logits = logits.float().div_(temperature.unsqueeze(1))
        top, self.token_ids, total = largest_logits(logits)
        least_kept, settled = edge_among(top, total, top_p, logits.shape[-1])
        weights = (top - top[:, :1]).exp_().masked_fill_(top < least_kept.unsqueeze(1), 0.0)
        self.weights = weights / weights.sum(-1, keepdim=True)
        whole = (~settled).nonzero().squeeze(1)
        self.place = torch.full((len(logits),), -1).index_copy_(0, whole, torch.arange(len(whole)))  # in ``whole``
        self.whole = apply_top_k_top_p(logits[whole], None, top_p[whole]).softmax(-1) if len(whole) else None

    def probability(self, tokens: Any) -> Any:
        """Of each row's token of ``tokens`` [rows]."""
        found = (self.weights * (self.token_ids == tokens.unsqueeze(1))).sum(-1)
        if self.whole is not None:
            is_whole = self.place >= 0
            found[is_whole] = self.whole.gather(1, tokens[is_whole].unsqueeze(1)).squeeze(1)
        return found

    def draw(self, rows: Any, without: Any = None) -> Any:
        """A token of each of ``rows``, int32, never the one of ``without`` [len(rows)]."""
        token_ids, weights, place = self.token_ids[rows], self.weights[rows], self.place[rows]
        if without is not None:
            weights = weights.masked_fill_(token_ids == without.unsqueeze(1), 0.0)
        drawn = token_ids.gather(1, _draw(weights)).squeeze(1)
        is_whole = place >= 0
        if self.whole is not None and is_whole.any():
            weights = self.whole[place[is_whole]]
            if without is not None:
                weights = weights.scatter_(1, without[is_whole].unsqueeze(1), 0.0)
            drawn[is_whole] = _draw(weights).squeeze(1)
        return drawn.int()


def _draw(weights: Any) -> Any:
    """A column of each row [rows, 1], as probable as its weight; with weights that are no numbers any one."""
    import torch

    return (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True)
