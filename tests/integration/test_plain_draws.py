"""Sampled requests verified by plain decode's own draws: its very tokens, and the target's distribution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serving.plain_draws import by_plain_draws
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


def generators(*requests: int) -> dict[int, torch.Generator]:
    return {i: torch.Generator().manual_seed(100 + i) for i in requests}


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
@pytest.mark.parametrize("scale", [PEAKED, FLAT])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"top_p": None},
        {"top_k": torch.tensor([5, 50, 4096, 3])},
        {"all_random": False, "temperature": torch.tensor([0.6, 0.0, 1.3, 0.0])},
    ],
    ids=["top-p", "no top-p", "top-k", "some greedy"],
)
def test_with_a_seed_a_request_is_given_what_plain_decode_gives_it(sampler, scale, asked, num_right):  # noqa: F811
    """Each of four requests has logits for four tokens, of which the drafts foretell so many."""
    logits, seeded = random_logits(16, scale), generators(0, 1, 2, 3)
    rows = logits.view(4, 4, -1)
    plain = [
        sampler.sampler(rows[:, i].clone(), sampled(4, generators=seeded, **asked)).sampled_token_ids[:, 0]
        for i in range(num_right + 1)
    ]
    answers = torch.stack(plain, 1)  # [4, num_right + 1]
    wrong = (answers[:, -1:] + 1) % VOCABULARY
    drafts = torch.cat([answers[:, :num_right], wrong.expand(4, 3)], 1)[:, :3]
    drawn = generators(0, 1, 2, 3)
    found = by_plain_draws(refuse)(
        sampler, batch_of(drafts.tolist()), None, logits.clone(), sampled(4, generators=drawn, **asked)
    ).sampled_token_ids
    assert torch.equal(found[:, : num_right + 1], answers.int()) and (found[:, num_right + 1 :] == -1).all()
    for i in range(4):  # the next step begins where plain decode's would
        assert torch.equal(drawn[i].get_state(), seeded[i].get_state())


def test_a_seed_is_each_requests_own(sampler):  # noqa: F811
    """Drafts of different lengths, and requests without a seed between those that have one."""
    logits = random_logits(7, PEAKED)
    rows = [logits[0:1], logits[1:3], logits[3:4], logits[4:7]]
    answers = {}
    for i, generator in generators(1, 3).items():
        plain = sampled(1, generators={0: generator})
        answers[i] = [int(sampler.sampler(row[None].clone(), plain).sampled_token_ids) for row in rows[i]]
    drafts = [[], answers[1][:1], [], answers[3][:2]]
    asked = sampled(4, generators=generators(1, 3))
    found = by_plain_draws(refuse)(sampler, batch_of(drafts), None, logits.clone(), asked).sampled_token_ids
    assert found[1].tolist() == [*answers[1], -1] and found[3].tolist() == answers[3]
    assert (found[[0, 2], 0] >= 0).all() and (found[[0, 2], 1:] == -1).all()


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
        by_plain_draws(refuse)(sampler, batch_of(drafts), None, batch.clone(), sampled(4)).sampled_token_ids.long()
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


def test_logits_that_are_no_numbers_give_a_token_and_no_error(sampler):  # noqa: F811
    logits = random_logits(8, PEAKED)
    logits[1] = torch.nan
    found = by_plain_draws(refuse)(sampler, batch_of([[1], [2], [3], [4]]), None, logits, sampled(4)).sampled_token_ids
    assert found.shape == (4, 2) and ((found >= -1) & (found < VOCABULARY)).all()


def test_log_probabilities_are_of_the_tokens_that_were_drawn(sampler):  # noqa: F811
    logits, asked = random_logits(8, PEAKED), sampled(4, generators=generators(0, 2), max_num_logprobs=2)
    found = by_plain_draws(refuse)(sampler, batch_of([[1], [2], [3], [4]]), None, logits.clone(), asked)
    token_ids, logprobs, *_ = found.logprobs_tensors
    expected = logits.view(4, 2, -1).log_softmax(-1)
    for request, tokens in enumerate(found.sampled_token_ids.tolist()):
        for position, token in enumerate(tokens):
            if token != -1:
                row = 2 * request + position
                assert token_ids[row, 0] == token
                torch.testing.assert_close(logprobs[row, 0], expected[request, position, token])
                assert logprobs[row, 1] == expected[request, position].max()


class MinPLogitsProcessor(SimpleNamespace):
    """As far as anybody looks."""

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("its rows are not these")


class LogitBiasLogitsProcessor(MinPLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False


class MinTokensLogitsProcessor(LogitBiasLogitsProcessor):
    pass


class SomebodysProcessor(MinPLogitsProcessor):
    pass


def penalised() -> dict[str, Any]:
    none, some = torch.zeros(4), torch.tensor([0.0, 0.5, 0.0, 0.0])
    return {
        "no_penalties": False, "frequency_penalties": some, "presence_penalties": none,
        "repetition_penalties": torch.ones(4),
    }  # fmt: skip


def masked() -> dict[str, Any]:
    mask = torch.zeros(4, VOCABULARY, dtype=torch.bool)
    mask[1, 5:] = True
    return {"allowed_token_ids_mask": mask}


@pytest.mark.parametrize(
    "asked",
    [
        penalised,
        masked,
        lambda: {"bad_words_token_ids": {1: [[7]]}},
        lambda: processors(MinPLogitsProcessor(min_p_count=1, min_p_cpu=np.array([0, 0.1, 0, 0, 0, 0]))),
        lambda: processors(LogitBiasLogitsProcessor(biases={1: {5: 1.0}})),
        lambda: processors(MinTokensLogitsProcessor(min_toks={1: (9, [], {2}, False)})),
    ],
)
def test_beside_a_request_that_asks_for_more_a_seed_gives_the_same(sampler, asked):  # noqa: F811
    """The second asks for more; first and last have a seed; the third, without one, is left to vLLM as well."""
    logits, more = random_logits(8, PEAKED), asked()
    alone = generators(0, 3)
    wanted = {
        i: int(sampler.sampler(logits[[2 * i]].clone(), sampled(1, generators={0: alone[i]})).sampled_token_ids)
        for i in alone
    }
    calls: list[Any] = []

    def theirs(*given: Any) -> Any:
        calls.append(given)
        return SimpleNamespace(sampled_token_ids=torch.full((4, 2), 7, dtype=torch.int32))

    wrong = [[(wanted.get(i, 0) + 1) % VOCABULARY] for i in range(4)]
    metadata, drawn = batch_of(wrong), generators(0, 1, 3)
    found = by_plain_draws(theirs)(sampler, metadata, None, logits, sampled(4, generators=drawn, **more))
    assert found.sampled_token_ids.tolist() == [[wanted[0], -1], [7, 7], [7, 7], [wanted[3], -1]]
    assert len(calls) == 1 and calls[0][4].generators == {1: drawn[1]}
    for i in alone:
        assert torch.equal(drawn[i].get_state(), alone[i].get_state())
    # without a seed nobody is better off here, so vLLM does it once for all
    unseeded = sampler, metadata, None, logits, sampled(4, **more)
    assert by_plain_draws(theirs)(*unseeded).sampled_token_ids.eq(7).all() and calls[1] == unseeded


@pytest.mark.parametrize(
    "asked",
    [
        lambda: {"all_greedy": True, "all_random": False},
        lambda: {"logprob_token_ids": {0: [1]}},
        lambda: {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
        lambda: processors(SomebodysProcessor()),
    ],
)
def test_what_is_not_understood_is_left_to_vllm(sampler, asked):  # noqa: F811
    calls: list[Any] = []
    arguments = sampler, batch_of([[1]] * 4), None, random_logits(8, PEAKED), sampled(4, **asked())
    assert by_plain_draws(lambda *given: calls.append(given) or "theirs")(*arguments) == "theirs"
    assert calls == [arguments]


def test_sampled_drafts_and_pretended_acceptance_are_left_to_vllm(sampler):  # noqa: F811
    verify = by_plain_draws(lambda *given: "theirs")
    metadata, logits = batch_of([[1]] * 4), random_logits(8, PEAKED)
    assert verify(sampler, metadata, logits[::2].softmax(-1), logits, sampled(4)) == "theirs"
    assert verify(SimpleNamespace(synthetic_mode=True), metadata, None, logits, sampled(4)) == "theirs"
    processed = SimpleNamespace(synthetic_mode=False, is_processed_logprobs_mode=True)
    assert verify(processed, metadata, None, logits, sampled(4, max_num_logprobs=1)) == "theirs"
    idle = sampled(4, **processors(MinPLogitsProcessor(min_p_count=0)))
    assert by_plain_draws(refuse)(sampler, metadata, None, logits, idle).sampled_token_ids.shape == (4, 2)
