"""Synthetic acceptance in vLLM's own rejection sampler on CPU: drafts are taken at the rates that were asked for,
whatever they are, and after a refused one comes what the target says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from serving.vllm_plugin import _patch_rejection

RATES = torch.tensor([0.8, 0.5, 1.0])  # of each position, given that the ones before were taken
TARGET, BONUS, DRAFT = 1, 2, 5
NUM_REQUESTS, VOCABULARY = 300, 16


@pytest.fixture(scope="module")
def rejection_sample():
    platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM")
    if not platforms.current_platform.is_cpu():
        pytest.skip("a GPU has kernels of its own")
    from vllm.utils import cpu_triton_utils

    _patch_rejection(cpu_triton_utils)
    platforms.current_platform.import_kernels()
    platforms.current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample.rejection_sampler import rejection_sample

    return rejection_sample


def sampled(rejection_sample, temperatures: torch.Tensor, drafts: list[int], *, rates: torch.Tensor | None = RATES):
    """[NUM_REQUESTS, 4] of requests with the same ``drafts``; the target is sure of ``TARGET`` everywhere."""
    width = len(drafts)
    logits = torch.zeros(NUM_REQUESTS * width, VOCABULARY)
    logits[:, TARGET] = 50
    greedy = temperatures == 0
    asked = SimpleNamespace(
        all_greedy=bool(greedy.all()), all_random=not greedy.any(), temperature=temperatures, generators={}
    )
    return rejection_sample(
        torch.tensor(drafts * NUM_REQUESTS, dtype=torch.int32), [width] * NUM_REQUESTS, 3,
        width * torch.arange(1, NUM_REQUESTS + 1, dtype=torch.int32), None, logits,
        torch.full((NUM_REQUESTS, 1), BONUS, dtype=torch.int32), asked,
        synthetic_mode=rates is not None, synthetic_conditional_rates=rates,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["greedy", "sampled", "both"])
def test_drafts_are_taken_at_the_rates_and_the_targets_token_follows(rejection_sample, kind):
    torch.manual_seed(0)
    temperatures = torch.full((NUM_REQUESTS,), {"greedy": 0.0, "sampled": 0.6, "both": 0.6}[kind])
    if kind == "both":
        temperatures[::2] = 0
    tokens = sampled(rejection_sample, temperatures, [DRAFT] * 3)
    num_taken = (tokens == DRAFT).sum(-1)
    for row, taken in zip(tokens.tolist(), num_taken.tolist(), strict=True):
        assert row == [DRAFT] * taken + [BONUS if taken == 3 else TARGET] + [-1] * (3 - taken)
    for position, rate in enumerate(RATES.tolist()):
        reached = num_taken >= position
        share = float((num_taken[reached] > position).float().mean())
        assert abs(share - rate) < 4 * max(0.01, rate * (1 - rate)) ** 0.5 / int(reached.sum()) ** 0.5


def test_padding_is_refused_and_narrow_drafts_get_their_bonus(rejection_sample):
    always = torch.ones(3)
    tokens = sampled(rejection_sample, torch.zeros(NUM_REQUESTS), [DRAFT, -1, DRAFT], rates=always)
    assert torch.equal(tokens, torch.tensor([DRAFT, TARGET, -1, -1]).expand_as(tokens).int())
    tokens = sampled(rejection_sample, torch.full((NUM_REQUESTS,), 0.6), [DRAFT], rates=always)
    assert torch.equal(tokens, torch.tensor([DRAFT, BONUS, -1, -1]).expand_as(tokens).int())


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_acceptance_that_is_not_synthetic_is_left_to_vllm(rejection_sample, temperature):
    temperatures = torch.full((NUM_REQUESTS,), temperature)
    tokens = sampled(rejection_sample, temperatures, [TARGET, DRAFT, TARGET], rates=None)
    assert torch.equal(tokens, torch.tensor([TARGET, TARGET, -1, -1]).expand_as(tokens).int())


def test_vllm_still_needs_it():
    cpu_triton_utils = pytest.importorskip("vllm.utils.cpu_triton_utils", reason="needs vLLM")
    theirs = cpu_triton_utils._rejection_greedy_sample_kernel_impl
    theirs = getattr(theirs, "__wrapped__", theirs)
    with pytest.raises(AssertionError, match="Synthetic"):
        theirs(*[None] * 9, SYNTHETIC_MODE=True)
