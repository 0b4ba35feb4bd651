"""The mended kernel against what it should do, and vLLM's own against it: the day that one is right, this fails."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from serving.nucleus import without_sort
from serving.vllm_plugin import (
    _patch_cpu_runner,
    any_length,
    any_width,
    expand,
    register,
    unpinned,
    with_restarted_generators,
    with_token_map,
    without_garbage,
)
from tests.unit.test_nucleus import by_sorting


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_values_reach_every_token_of_their_request(dtype):
    output = torch.full((6,), -1, dtype=dtype)
    expand(output, torch.tensor([0, 7, 5], dtype=dtype), torch.tensor([3, 3, 6], dtype=torch.int32), 0, 1)
    assert output.tolist() == [1, 1, 1, 5, 5, 5]


def test_vllm_still_needs_it_and_gets_it():
    platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the defect is the CPU build's")
    platforms.current_platform.import_kernels()
    from vllm.utils import cpu_triton_utils

    theirs = cpu_triton_utils._expand_kernel_impl
    arguments = (torch.tensor([0.2, 0.7]), torch.tensor([2, 3], dtype=torch.int32), 0, 1)
    output = torch.full((3,), -1.0)
    if theirs is not expand:
        theirs(output, *arguments)
        assert output.tolist() == [-1.0] * 3, "vLLM writes the values now: remove serving/vllm_plugin.py"
    register()
    cpu_triton_utils._expand_kernel_impl(output, *arguments)
    torch.testing.assert_close(output, torch.tensor([0.2, 0.2, 0.7]))


def test_compiling_uses_any_core_and_the_pin_comes_back(monkeypatch):
    pinned = [{0}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2} if pid == os.getppid() else pinned[-1])
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(cores))

    def compile_model(runner):
        assert pinned[-1] == {0, 1, 2}
        raise RuntimeError("compiler")

    with pytest.raises(RuntimeError, match="compiler"):
        unpinned(compile_model)(SimpleNamespace())
    assert pinned == [{0}, {0, 1, 2}, {0}]


def test_garbage_is_collected_before_the_compiler_traces():
    released = []

    class Handler:
        def __init__(self):
            self.itself = self

        def __del__(self):
            released.append("handler")

    gc.disable()  # else it may be gone already
    try:
        Handler()
        assert released == []
        without_garbage(lambda runner: released.append(runner))("compiled")
    finally:
        gc.enable()
    assert released == ["handler", "compiled"]


def test_plugins_that_are_loaded_twice_change_the_cpu_runner_once(monkeypatch):
    platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM")
    if not platforms.current_platform.is_cpu():
        pytest.skip("the runner is the CPU build's")
    from vllm import _custom_ops
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    for owner, name in (
        (_custom_ops, "create_onednn_mm"),
        (CPUModelRunner, "warming_up_model"),
        (CPUModelRunner, "_bookkeeping_sync"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back after the test
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    theirs = _custom_ops.create_onednn_mm, CPUModelRunner.warming_up_model, CPUModelRunner._bookkeeping_sync
    _patch_cpu_runner()
    once = _custom_ops.create_onednn_mm, CPUModelRunner.warming_up_model, CPUModelRunner._bookkeeping_sync
    assert not set(once) & set(theirs)
    _patch_cpu_runner()
    assert once == (_custom_ops.create_onednn_mm, CPUModelRunner.warming_up_model, CPUModelRunner._bookkeeping_sync)


def medusa_with_a_truncated_vocabulary():
    """vLLM's own model, as far as its ``load_weights`` looks."""
    from vllm.model_executor.models.medusa import Medusa

    model = Medusa.__new__(Medusa)
    torch.nn.Module.__init__(model)
    model.config, model.token_map = SimpleNamespace(original_lm_head=True), None
    model.truncated_vocab_size, model.orig_vocab_size = 2, 4
    model.lm_head = torch.nn.Linear(3, 2, bias=False)
    model.lm_heads = [model.lm_head]
    return model


def test_a_truncated_medusa_head_loads():
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models.medusa import Medusa

    def load(load_weights) -> list[int]:
        model = medusa_with_a_truncated_vocabulary()
        weights = [("token_map", torch.tensor([0, 3])), ("lm_head.weight", torch.ones(2, 3))]
        DefaultModelLoader.track_weights_loading(SimpleNamespace(), model, load_weights(model, weights))
        return model.token_map.tolist()

    theirs = getattr(Medusa.load_weights, "__wrapped__", Medusa.load_weights)
    with pytest.raises(ValueError, match="token_map"):  # the day that it does not: remove with_token_map
        load(theirs)
    assert load(with_token_map(theirs)) == [0, 3]


def test_medusa_drafts_any_number_of_tokens():
    def propose(proposer, num_speculative_tokens, target_hidden_states, sampling_metadata):
        assert num_speculative_tokens == proposer.num_speculative_tokens == 3
        return torch.arange(6).view(2, 3)

    proposer, states = SimpleNamespace(num_speculative_tokens=3), torch.zeros(2, 8)
    for width in range(4):
        drafts = any_width(propose)(
            proposer, num_speculative_tokens=width, target_hidden_states=states, sampling_metadata=None
        )
        assert drafts.tolist() == torch.arange(6).view(2, 3)[:, :width].tolist()


def test_suffix_lookup_drafts_any_number_of_tokens_and_reads_every_step():
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

    theirs, read = SuffixDecodingProposer.propose, []
    theirs = getattr(theirs, "__wrapped__", theirs)
    tree = SimpleNamespace(
        active_requests={"a"},
        add_active_response=lambda name, sampled: read.append(list(sampled)),
        speculate=lambda name, pattern, **limits: SimpleNamespace(token_ids=[7, 8]),  # it may find less than was asked
    )
    proposer = SimpleNamespace(
        num_speculative_tokens=3, max_model_len=64, max_tree_depth=8, max_spec_factor=1.0, min_token_prob=0.1,
        suffix_cache=tree,
    )  # fmt: skip
    batch = SimpleNamespace(
        req_ids=["a"], req_id_to_index={"a": 0}, num_tokens_no_spec=[4], token_ids_cpu=torch.zeros(1, 8)
    )
    with pytest.raises(AssertionError):  # the day that it takes any number: remove any_length
        theirs(proposer, 1, batch, [[5]])
    drafts = [any_length(theirs)(proposer, width, batch, [[width]]) for width in range(4)]
    assert drafts == [[[]], [[7]], [[7, 8]], [[7, 8]]]
    assert read == [[0], [1], [2], [3]]


def test_a_seeded_prompt_in_chunks_starts_its_generator_over_and_the_engine_lives():
    generators = {i: torch.Generator().manual_seed(i) for i in range(3)}
    wanted = torch.rand(1, generator=torch.Generator().manual_seed(0))
    for generator in generators.values():
        torch.rand(4, generator=generator)  # the token of the chunk that is discarded
    advanced = {i: generator.get_state() for i, generator in generators.items()}
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators=generators, num_reqs=3, req_ids=["new", "resumed", "decoding"]),
        discard_request_mask=SimpleNamespace(np=[True, True, False, True]),
        requests={name: SimpleNamespace(output_token_ids=[5] * (name != "new")) for name in ("new", "resumed")},
    )

    def bookkeeping(runner, result):
        for i in (0, 1):  # as vLLM does, where there is one
            if (generator := runner.input_batch.generators.get(i)) is not None:
                generator.set_offset(generator.get_offset() - 4)
        return result

    with pytest.raises(RuntimeError, match="offset"):
        bookkeeping(runner, "result")
    assert with_restarted_generators(bookkeeping)(runner, "result") == "result"
    assert set(generators) == {0, 1, 2}
    assert torch.equal(generators[1].get_state(), advanced[1]) and torch.equal(generators[2].get_state(), advanced[2])
    assert torch.equal(torch.rand(1, generator=generators[0]), wanted)


def test_vllm_s_own_top_p_is_what_ours_is_tested_against():
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler", reason="needs vLLM")
    theirs = getattr(sampler.apply_top_k_top_p_pytorch, "__wrapped__", sampler.apply_top_k_top_p_pytorch)
    logits = (torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 6).round() / 2  # with ties
    p = torch.linspace(0.3, 1, 64)
    expected = theirs(logits.clone(), None, p, allow_cpu_sync=True)
    assert torch.equal(by_sorting(logits.clone(), None, p), expected)
    assert torch.equal(without_sort(theirs)(logits.clone(), None, p, allow_cpu_sync=True), expected)
