"""Verification by one argmax gives vLLM's own tokens, ties included, and leaves all else to vLLM; with quicker noise a
sampled token follows the target's distribution, and a seed gives what it gave. A step without drafts verifies none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from serving.verification import (
    as_plain_step,
    by_one_argmax,
    with_nothing_to_verify,
    with_one_token_each,
    with_quick_noise,
)

WIDTHS = [3, 0, 2, 3]  # draft tokens of each request
VOCABULARY = 4096


@pytest.fixture(scope="module")
def sampler():
    platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the kernels are the CPU build's")
    platforms.current_platform.import_kernels()
    platforms.current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    return RejectionSampler(Sampler())


def batch_of(drafts: list[list[int]]):
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    ends = metadata.cu_num_sampled_tokens.long() - 1
    rows = torch.arange(sum(map(len, drafts)) + len(drafts))
    metadata.bonus_logits_indices = ends
    metadata.target_logits_indices = rows[~torch.isin(rows, ends)]
    return metadata


def greedy(**changes):
    from vllm.v1.sample.logits_processor.state import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    none = torch.empty(0)
    asked = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None, generators={},
        max_num_logprobs=None, no_penalties=True, prompt_token_ids=None, frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none, output_token_ids=[[] for _ in WIDTHS], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(), spec_token_ids=[[] for _ in WIDTHS],
    )  # fmt: skip
    return dataclasses.replace(asked, **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_tokens_are_vllms_own_also_where_logits_tie(sampler, dtype):
    theirs = getattr(type(sampler).forward, "__wrapped__", type(sampler).forward)
    generator = torch.Generator().manual_seed(0)
    num_accepted = 0
    for _ in range(40):
        logits = (torch.randn(sum(WIDTHS) + len(WIDTHS), VOCABULARY, generator=generator) * 2).round().to(dtype)
        best = logits.float().argmax(-1)
        assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any(), "some rows tie"
        drafts, row = [], 0
        for width in WIDTHS:
            right = [int(token) for token in best[row : row + width]]
            drafts.append([token if torch.rand(1, generator=generator) < 0.7 else 5 for token in right])
            row += width + 1
        arguments = batch_of(drafts), None, logits, greedy()
        expected = theirs(sampler, *arguments).sampled_token_ids
        found = by_one_argmax(refuse)(sampler, *arguments)
        assert torch.equal(found.sampled_token_ids, expected) and found.logprobs_tensors is None
        num_accepted += int((expected >= 0).sum()) - len(WIDTHS)
    assert 0 < num_accepted < 40 * sum(WIDTHS)


def refuse(*arguments):
    raise AssertionError("an argmax is enough")


class LogitBiasLogitsProcessor(SimpleNamespace):
    """As far as anybody looks."""

    def is_argmax_invariant(self) -> bool:
        return False


class OwnProcessor(LogitBiasLogitsProcessor):
    """One that this project does not know."""


def processors(*each):
    from vllm.v1.sample.logits_processor.state import LogitsProcessors

    return {"logitsprocs": LogitsProcessors(each)}


@pytest.mark.parametrize(
    "asked",
    [
        lambda: {"all_greedy": False},
        lambda: {"max_num_logprobs": 0},
        lambda: {"logprob_token_ids": {0: [1]}},
        lambda: {"no_penalties": False},
        lambda: {"allowed_token_ids_mask": torch.zeros(1)},
        lambda: {"bad_words_token_ids": {0: [[1]]}},
        lambda: {"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)},
        lambda: processors(LogitBiasLogitsProcessor(biases={0: {1: 2.0}})),
        lambda: processors(OwnProcessor(biases={})),
    ],
)
def test_whatever_changes_the_logits_is_left_to_vllm(sampler, asked):
    metadata = batch_of([[1, 2, 3]] * 4)
    calls = []
    verify = by_one_argmax(lambda *arguments: calls.append(arguments) or "theirs")
    arguments = sampler, metadata, None, torch.zeros(16, VOCABULARY), greedy(**asked())
    assert verify(*arguments) == "theirs" and calls == [arguments]


def test_an_idle_processor_changes_nothing_and_pretended_acceptance_is_vllms(sampler):
    arguments = batch_of([[1, 2, 3]] * 4), None, torch.zeros(16, VOCABULARY)
    idle = greedy(**processors(LogitBiasLogitsProcessor(biases={})))
    assert by_one_argmax(refuse)(sampler, *arguments, idle).sampled_token_ids.shape == (4, 4)
    pretending = SimpleNamespace(synthetic_mode=True)
    assert by_one_argmax(lambda *arguments: "theirs")(pretending, *arguments, greedy()) == "theirs"


def recovered(sample, probabilities, drafts, generators):
    """One replacement for each draft token of 4 requests with two each."""
    metadata = batch_of(drafts)
    asked = SimpleNamespace(generators=generators)
    return sample(
        2, metadata.num_draft_tokens, metadata.cu_num_draft_tokens, metadata.draft_token_ids, None, probabilities,
        asked, torch.device("cpu"),
    )  # fmt: skip


def test_replacements_follow_the_distribution_without_the_rejected_token(sampler):
    from vllm.v1.sample.rejection_sampler import sample_recovered_tokens as theirs

    target = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    wanted = target.clone()
    wanted[0] = 0  # rejected: it was a draft of probability 1
    wanted /= wanted.sum()
    torch.manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(1500):
        tokens = recovered(with_quick_noise(theirs), target.repeat(8, 1), [[0, 0]] * 4, {})
        counts += torch.bincount(tokens.long()[::2], minlength=6)  # the two of a request share their noise
    assert counts[0] == counts[5] == 0
    seen, expected = counts[1:5], wanted[1:5] * counts.sum()
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # p = 0.001 at three degrees of freedom


def test_a_seeded_request_is_given_what_vllm_gives_it(sampler):
    from vllm.v1.sample.rejection_sampler import sample_recovered_tokens as theirs

    theirs = getattr(theirs, "__wrapped__", theirs)
    probabilities = torch.rand(8, VOCABULARY, generator=torch.Generator().manual_seed(1)).softmax(-1)
    drafts = [[1, 2]] * 4
    ours, own = (
        recovered(sample, probabilities, drafts, {i: torch.Generator().manual_seed(i) for i in range(4)})
        for sample in (with_quick_noise(theirs), theirs)
    )
    assert torch.equal(ours, own)


@pytest.mark.parametrize("num_draft_tokens", [[0, 0, 0], [3, 0, 2], [0, 0, 1]])
def test_only_a_step_with_drafts_is_prepared_to_verify_some(num_draft_tokens):
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    device = torch.device("cpu")
    runner = SimpleNamespace(
        _arange_scratch=np.arange(64),
        arange_np=np.arange(64),
        device=device,
        input_ids=SimpleNamespace(gpu=torch.arange(100, 164)),
    )
    runner._get_cumsum_and_arange = GPUModelRunner._get_cumsum_and_arange.__get__(runner)
    counts = np.array(num_draft_tokens, dtype=np.int32)
    ends = np.cumsum(counts + np.array([1, 7, 1]), dtype=np.int32)  # the second one reads a part of a prompt
    theirs = GPUModelRunner._calc_spec_decode_metadata(runner, counts, ends)
    calc = with_nothing_to_verify(GPUModelRunner._calc_spec_decode_metadata)

    def prepare_inputs(runner):
        metadata = calc(runner, counts, ends)
        return metadata.logits_indices, metadata, int(counts.max()) + 1

    indices, metadata, max_sampled = as_plain_step(prepare_inputs)(runner)
    assert indices.tolist() == theirs.logits_indices.tolist() and indices.dtype == theirs.logits_indices.dtype
    assert (metadata is None) == (not any(num_draft_tokens)) and max_sampled == max(num_draft_tokens) + 1
    if metadata is not None:
        assert metadata.draft_token_ids.tolist() == theirs.draft_token_ids.tolist()


@pytest.mark.parametrize("discarded", [None, 1])
@pytest.mark.parametrize("sampled", [[[5], [6], [7]], [[5, -1], [6, 8], [7, -1]]])
def test_what_the_head_reads_next_is_what_vllm_says(sampler, sampled, discarded):
    """``sampler``: registers the CPU build's kernels. A discarded request's next token is of its prompt."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    backup = torch.zeros(8, dtype=torch.int32)
    drafter = SimpleNamespace(
        backup_next_token_ids=SimpleNamespace(np=backup.numpy(), gpu=backup, copy_to_gpu=lambda count: None)
    )
    requests = {name: SimpleNamespace(get_token_id=lambda at: 40 + at) for name in "abc"}
    batch = SimpleNamespace(num_reqs=3, req_ids=list("abc"), num_tokens_no_spec=[1, 2, 3], vocab_size=100)
    is_discarded = torch.zeros(8, dtype=torch.bool)
    if discarded is not None:
        is_discarded[discarded] = True
    theirs = SpecDecodeBaseProposer.prepare_next_token_ids_padded
    arguments = drafter, torch.tensor(sampled, dtype=torch.int32), requests, batch, is_discarded
    for found, wanted in zip(with_one_token_each(theirs)(*arguments), theirs(*arguments), strict=True):
        assert found.tolist() == wanted.tolist() and found.dtype == wanted.dtype
