"""Verification on CPU without work that changes nothing (``experiments/step_anatomy`` shows what it cost).

**Greedy.** vLLM 0.32's rejection sampler gathers the logits of all draft tokens, converts them to float32, clones them
for log-probabilities that nobody may have asked for, and takes torch's argmax. Where every request is greedy and
nothing is to change the logits, the same tokens follow from the logits as they came, by the kernel that vLLM has for
plain decode.

**Sampled.** A rejected draft token is replaced by the largest of p / q with q exponential noise, one draw for each
token of the vocabulary. torch draws it on one core, slower than -log(u) with u uniform, which is distributed alike.
Requests with a seed keep torch's draws, so that a seed gives what it gave.

**Nothing.** In a server with a head vLLM 0.32 prepares and verifies drafts in every step, also where no request has
one: at K = 0 the logits of all requests are copied to be sampled. Such a step is sampled as plain decode samples, and
what the head reads next are the sampled tokens themselves.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any


def by_one_argmax(forward: Any) -> Any:
    """``RejectionSampler.forward``, called only where greedy verification takes more than an argmax."""

    @functools.wraps(forward)
    def verify(sampler: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if sampler.synthetic_mode or not leaves_logits_alone(sampling_metadata):
            return forward(sampler, metadata, draft_probs, logits, sampling_metadata)
        import torch
        from vllm.v1.outputs import SamplerOutput
        from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, _rejection_greedy_sample

        best = torch.ops._C.greedy_argmax(logits.float()).flatten()
        shape = len(metadata.num_draft_tokens), metadata.max_spec_len + 1
        sampled = torch.full(shape, PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
        _rejection_greedy_sample(
            sampled,
            metadata.cu_num_draft_tokens,
            metadata.draft_token_ids,
            best[metadata.target_logits_indices],
            best[metadata.bonus_logits_indices].unsqueeze(1),
            None,  # every request is greedy
            metadata.max_spec_len,
            None,
            None,
        )
        return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)

    return verify


def leaves_logits_alone(sampling_metadata: Any) -> bool:
    """Whether every request takes the largest of the logits as they are, and wants no log-probabilities."""
    return bool(sampling_metadata.all_greedy and asks_nothing_else(sampling_metadata))


def asks_nothing_else(sampling_metadata: Any) -> bool:
    """Whether no request wants log-probabilities, or logits changed in other ways than by temperature, top-k, top-p."""
    budgets = sampling_metadata.thinking_budget_state_holder
    return bool(
        sampling_metadata.max_num_logprobs is None
        and not sampling_metadata.logprob_token_ids
        and sampling_metadata.no_penalties
        and sampling_metadata.allowed_token_ids_mask is None
        and not sampling_metadata.bad_words_token_ids
        and (budgets is None or not budgets.has_tracked_requests())
        and all(map(is_idle, sampling_metadata.logitsprocs.non_argmax_invariant))
    )


def is_idle(processor: Any) -> bool:
    """Whether it is one of vLLM's own, and no request asks for it."""
    return rows_changed_by(processor) == set()


def rows_changed_by(processor: Any) -> set[int] | None:
    """The requests that ask for a logit bias, a minimum of tokens or of probability; None of other processors."""
    name = type(processor).__name__
    if name == "LogitBiasLogitsProcessor":
        return set(processor.biases)
    if name == "MinTokensLogitsProcessor":
        return set(processor.min_toks)
    if name == "MinPLogitsProcessor":
        return set(processor.min_p_cpu.nonzero()[0].tolist()) if processor.min_p_count else set()
    return None


def with_quick_noise(sample_recovered_tokens: Any) -> Any:
    """``sample_recovered_tokens`` of vLLM's rejection sampler; its own where float64 noise is asked for."""

    @functools.wraps(sample_recovered_tokens)
    def sample(
        max_spec_len: int,
        num_draft_tokens: list[int],
        cu_num_draft_tokens: Any,
        draft_token_ids: Any,
        draft_probs: Any,
        target_probs: Any,  # [tokens, vocab]
        sampling_metadata: Any,
        device: Any,
        use_fp64_gumbel: bool = False,
    ) -> Any:
        if use_fp64_gumbel:
            return sample_recovered_tokens(
                max_spec_len, num_draft_tokens, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs,
                sampling_metadata, device, use_fp64_gumbel,
            )  # fmt: skip
        import torch
        from vllm.v1.sample.rejection_sampler import _sample_recovered_tokens

        # u = 0 gives an infinite q: that token is not drawn, as it would not be in one of 2^24 draws.
        noise = torch.rand(len(num_draft_tokens), target_probs.shape[-1], device=device).log_().neg_()
        for i, generator in sampling_metadata.generators.items():
            if num_draft_tokens[i] > 0:
                noise[i].exponential_(generator=generator)
        recovered = torch.empty_like(draft_token_ids)
        _sample_recovered_tokens(
            recovered, cu_num_draft_tokens, draft_token_ids, draft_probs, target_probs, noise.reciprocal_(),
            max_spec_len=max_spec_len,
        )  # fmt: skip
        return recovered

    return sample


def with_nothing_to_verify(calc_metadata: Any) -> Any:
    """The runner's ``_calc_spec_decode_metadata``; without a draft only which logits count, the last of each."""

    @functools.wraps(calc_metadata)
    def calc(runner: Any, num_draft_tokens: Any, cu_num_scheduled_tokens: Any) -> Any:
        if num_draft_tokens.any():
            return calc_metadata(runner, num_draft_tokens, cu_num_scheduled_tokens)
        import torch

        return SimpleNamespace(logits_indices=torch.from_numpy(cu_num_scheduled_tokens - 1))

    return calc


def as_plain_step(prepare_inputs: Any) -> Any:
    """The runner's ``_prepare_inputs``, which gives no metadata of drafts where no request has more than one token."""

    @functools.wraps(prepare_inputs)
    def prepare(runner: Any, *args: Any, **kwargs: Any) -> Any:
        logits_indices, metadata, max_sampled = prepare_inputs(runner, *args, **kwargs)
        return logits_indices, metadata if max_sampled > 1 else None, max_sampled

    return prepare


def with_one_token_each(prepare_next_token_ids: Any) -> Any:
    """The proposer's ``prepare_next_token_ids_padded``; where each request was given one token, it is the next one."""

    @functools.wraps(prepare_next_token_ids)
    def prepare(drafter: Any, sampled_token_ids: Any, requests: Any, input_batch: Any, is_discarded: Any) -> Any:
        count, width = sampled_token_ids.shape
        if width > 1 or is_discarded[:count].any():
            return prepare_next_token_ids(drafter, sampled_token_ids, requests, input_batch, is_discarded)
        next_ids = sampled_token_ids[:, 0].int()
        return next_ids, next_ids.new_ones(count)

    return prepare
