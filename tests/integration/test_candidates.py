"""Sampled requests verified by their candidates: the target's own distribution, token by token, whatever the drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.candidates import Rows, by_candidates
from tests.integration.test_verification import (
    VOCABULARY,
    batch_of,
    greedy,
    processors,
    refuse,
    sampler,  # noqa: F401  # a fixture
)

TEMPERATURE, TOP_P = 0.6, 0.95
PEAKED, FLAT = 3.0, 0.3  # scales of logits: a nucleus of tens of tokens, and one of thousands that must be sorted


def random_logits(num_rows: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def sampled(num_requests: int, **changes: Any) -> Any:
    temperature, top_p = torch.full((num_requests,), TEMPERATURE), torch.full((num_requests,), TOP_P)
    return greedy(**{"all_greedy": False, "all_random": True, "temperature": temperature, "top_p": top_p, **changes})


def target_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """What plain decode samples from, in float64: by sorting."""
    logits = (logits / TEMPERATURE).double()
    ordered, token_ids = logits.sort(-1)
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - TOP_P
    dropped[:, -1] = False
    return (
        torch.full_like(logits, -torch.inf)
        .scatter_(-1, token_ids, ordered.masked_fill(dropped, -torch.inf))
        .softmax(-1)
    )


@pytest.mark.parametrize("scale", [PEAKED, FLAT])
def test_a_drafts_probability_is_the_targets(sampler, scale):  # noqa: F811
    logits = random_logits(40, scale)
    expected = target_probabilities(logits)
    rows = Rows(logits.clone(), torch.full((40,), TEMPERATURE), torch.full((40,), TOP_P))
    assert (rows.whole is None) == (scale == PEAKED)
    for rank in (0, 1, 5, 3000):
        tokens = expected.argsort(-1, descending=True)[:, rank]
        wanted = expected.gather(1, tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(rows.probability(tokens).double(), wanted, rtol=1e-4, atol=1e-9)


def chi_squared(tokens: torch.Tensor, probabilities: torch.Tensor, num_bins: int = 8) -> float:
    """Of tokens in bins of about the same mass."""
    order = probabilities.argsort(descending=True)
    bin_of = torch.empty(len(order), dtype=torch.long)
    middle = probabilities[order].cumsum(0) - probabilities[order] / 2
    bin_of[order] = (middle * num_bins).long().clamp(max=num_bins - 1)
    wanted = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bin_of, probabilities) * len(tokens)
    seen = torch.bincount(bin_of[tokens], minlength=num_bins).double()
    is_used = wanted > 0
    return float(((seen - wanted)[is_used] ** 2 / wanted[is_used]).sum())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("scale", [PEAKED, FLAT])
def test_tokens_follow_the_target_whether_or_not_drafts_are_accepted(sampler, scale, rank):  # noqa: F811
    """Four requests with the same logits draft the token of this rank twice, one of them nothing."""
    torch.manual_seed(1)
    logits = random_logits(3, scale)
    probabilities = target_probabilities(logits)
    first, second = (int(probabilities[i].argsort(descending=True)[rank]) for i in range(2))
    drafts = [[first, second], [first, second], [], [first, second]]
    batch = torch.cat([logits, logits, logits[:1], logits])
    found = torch.cat([
        by_candidates(refuse)(sampler, batch_of(drafts), None, batch.clone(), sampled(4)).sampled_token_ids.long()
        for _ in range(400)
    ])  # fmt: skip
    assert found.shape == (1600, 3) and (found[2::4, 1:] == -1).all() and (found[:, 0] >= 0).all()
    assert chi_squared(found[:, 0], probabilities[0]) < 24.3  # p = 0.001 at seven degrees of freedom
    longer = found[found[:, 1] >= 0]
    assert (longer[:, 0] == first).all(), "no token comes behind a rejected one"
    assert abs(len(longer) / 1200 - float(probabilities[0, first])) < 0.05
    if scale == PEAKED:
        assert chi_squared(longer[:, 1], probabilities[1]) < 24.3
        longest = longer[longer[:, 2] >= 0]
        assert (longest[:, 1] == second).all() and chi_squared(longest[:, 2], probabilities[2]) < 24.3
    assert (probabilities[0][found[:, 0]] > 0).all()


def test_a_replacement_is_never_the_rejected_draft(sampler):  # noqa: F811
    torch.manual_seed(2)
    for scale in (PEAKED, FLAT):
        logits = random_logits(1, scale).repeat(64, 1)
        if scale == FLAT:
            logits[:, 7] = 5.0  # half of the mass, and still a nucleus of thousands
        rows = Rows(logits.clone(), torch.full((64,), TEMPERATURE), torch.full((64,), TOP_P))
        best = logits.argmax(-1)
        assert (rows.whole is None) == (scale == PEAKED) and (rows.draw(torch.arange(64)) == best).any()
        assert (rows.draw(torch.arange(64), without=best) != best).all()


def test_logits_that_are_no_numbers_give_a_token_and_no_error(sampler):  # noqa: F811
    logits = random_logits(8, PEAKED)
    logits[1] = torch.nan
    found = by_candidates(refuse)(sampler, batch_of([[1], [2], [3], [4]]), None, logits, sampled(4)).sampled_token_ids
    assert found.shape == (4, 2) and ((found >= -1) & (found < VOCABULARY)).all()


class MinPLogitsProcessor(SimpleNamespace):
    """As far as anybody looks."""

    def is_argmax_invariant(self) -> bool:
        return True


@pytest.mark.parametrize(
    "asked",
    [
        lambda: {"all_random": False},
        lambda: {"top_p": None},
        lambda: {"top_k": torch.full((4,), 9)},
        lambda: {"generators": {0: torch.Generator()}},
        lambda: {"max_num_logprobs": 1},
        lambda: {"no_penalties": False},
        lambda: processors(MinPLogitsProcessor(min_p_count=1)),
    ],
)
def test_whatever_is_not_top_p_alone_is_left_to_vllm(sampler, asked):  # noqa: F811
    calls: list[Any] = []
    arguments = sampler, batch_of([[1]] * 4), None, random_logits(8, PEAKED), sampled(4, **asked())
    assert by_candidates(lambda *given: calls.append(given) or "theirs")(*arguments) == "theirs"
    assert calls == [arguments]


def test_sampled_drafts_pretended_acceptance_and_a_small_vocabulary_are_left_to_vllm(sampler):  # noqa: F811
    verify = by_candidates(lambda *given: "theirs")
    metadata, logits = batch_of([[1]] * 4), random_logits(8, PEAKED)
    assert verify(sampler, metadata, logits[::2].softmax(-1), logits, sampled(4)) == "theirs"
    assert verify(SimpleNamespace(synthetic_mode=True), metadata, None, logits, sampled(4)) == "theirs"
    assert verify(sampler, metadata, None, logits[:, :256], sampled(4)) == "theirs"
    idle = sampled(4, **processors(MinPLogitsProcessor(min_p_count=0)))
    assert by_candidates(refuse)(sampler, metadata, None, logits, idle).sampled_token_ids.shape == (4, 2)
