"""Verification of sampled requests on CPU by the very draws of plain decode.

Where drafts are not sampled themselves, rejection sampling (Leviathan et al. 2023, algorithm 1) accepts token d with
its probability p(d), and replaces it by a draw from p without d. To draw from p as plain decode does, and to accept d
if it is what was drawn, comes to the same: d is drawn with probability p(d), and any other token with its own. So a
request is given token by token what vLLM's sampler draws for it, as long as that is what was drafted. Two things
follow:

- A seed gives the same answer with drafts, of whatever head and however many, as without: a request's generator is
  asked once for each token of its answer, by the code that asks it in plain decode.
- Only rows that bring a token are looked at, where vLLM 0.32 makes the probabilities of every draft token's row, and
  draws for each what would replace it.

Requests that ask for more than temperature, top-p, top-k, a seed and log-probabilities are left to vLLM. A step that
has both kinds is verified both ways if a request has a seed, so that its answer does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from serving.verification import rows_changed_by


def by_plain_draws(forward: Any) -> Any:
    """``RejectionSampler.forward``, called only for requests that ask for more than the sampler's plain draws."""

    @functools.wraps(forward)
    def verify(sampler: Any, metadata: Any, draft_probs: Any, logits: Any, asked: Any) -> Any:
        is_ours = None
        if draft_probs is None and not sampler.synthetic_mode and not asked.all_greedy:
            is_ours = ours_of(sampler, asked, len(metadata.num_draft_tokens))
        if is_ours is None or not is_ours.any():
            return forward(sampler, metadata, draft_probs, logits, asked)
        import torch
        from vllm.v1.outputs import SamplerOutput

        tokens = _verify(sampler.sampler, metadata, logits, asked, is_ours.nonzero().squeeze(1))
        if not is_ours.all():
            theirs = {i: generator for i, generator in asked.generators.items() if not is_ours[i]}
            rest = dataclasses.replace(asked, generators=theirs, max_num_logprobs=None)
            found = forward(sampler, metadata, None, logits, rest).sampled_token_ids
            tokens = torch.where(is_ours.unsqueeze(1), tokens, found)
        logprobs = None
        if asked.max_num_logprobs is not None:
            target, bonus = logits[metadata.target_logits_indices].float(), logits[metadata.bonus_logits_indices]
            logprobs = sampler._get_logprobs_tensors(asked.max_num_logprobs, metadata, logits, target, bonus, tokens)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    return verify


def ours_of(sampler: Any, asked: Any, count: int) -> Any:
    """Which of ``count`` requests are verified here, bool [requests]; None where that is not understood.

    All, if each asks for plain draws; else those that do and have a seed.
    """
    import torch

    wants_more = requests_that_want_more(asked)
    if wants_more is None or (asked.max_num_logprobs is not None and sampler.is_processed_logprobs_mode):
        return None
    is_plain = torch.ones(count, dtype=torch.bool)
    is_plain[[row for row in wants_more if row < count]] = False
    if is_plain.all():
        return is_plain
    has_seed = torch.zeros(count, dtype=torch.bool)
    has_seed[list(asked.generators)] = True
    return is_plain & has_seed


def requests_that_want_more(asked: Any) -> set[int] | None:
    """Those whose logits are changed in other ways than by temperature, top-p and top-k; None where nobody knows."""
    budgets = asked.thinking_budget_state_holder
    if asked.logprob_token_ids or (budgets is not None and budgets.has_tracked_requests()):
        return None
    found = set(asked.bad_words_token_ids)
    if not asked.no_penalties:
        is_penalised = (asked.frequency_penalties != 0) | (asked.presence_penalties != 0)
        found |= set((is_penalised | (asked.repetition_penalties != 1)).nonzero().flatten().tolist())
    if asked.allowed_token_ids_mask is not None:
        found |= set(asked.allowed_token_ids_mask.any(-1).nonzero().flatten().tolist())
    for processor in (*asked.logitsprocs.argmax_invariant, *asked.logitsprocs.non_argmax_invariant):
        rows = rows_changed_by(processor)
        if rows is None:
            return None
        found |= rows
    return found


def _verify(sampler: Any, metadata: Any, logits: Any, asked: Any, going: Any) -> Any:
    """Accepted tokens and the one that follows them, int32 [requests, longest draft + 1], -1 behind them and in the
    rows of requests that are not in ``going``."""
    import torch
    from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

    lengths = torch.tensor(metadata.num_draft_tokens)
    first_draft = lengths.cumsum(0) - lengths
    first_row = metadata.bonus_logits_indices - lengths
    sampled = torch.full((len(lengths), metadata.max_spec_len + 1), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    for position in range(metadata.max_spec_len + 1):
        drawn, _ = sampler.sample(logits[first_row[going] + position].float(), _only(asked, going))
        sampled[going, position] = drawn.int()
        is_drafted = lengths[going] > position
        going, drawn = going[is_drafted], drawn[is_drafted]
        going = going[drawn == metadata.draft_token_ids[first_draft[going] + position]]  # so far all were drawn
        if not len(going):
            break
    return sampled


def _only(asked: Any, requests: Any) -> Any:
    """What these of the requests ask of the sampler: nothing that its processors would do."""
    from vllm.v1.sample.logits_processor.state import LogitsProcessors

    generators = {i: asked.generators[row] for i, row in enumerate(requests.tolist()) if row in asked.generators}
    rows = {
        name: None if (values := getattr(asked, name)) is None else values[requests]
        for name in ("temperature", "top_p", "top_k")
    }
    return dataclasses.replace(asked, generators=generators, logitsprocs=LogitsProcessors(), **rows)
