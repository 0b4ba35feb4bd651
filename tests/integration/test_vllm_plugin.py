"""The mended kernel against what it should do, and vLLM's own against it: the day that one is right, this fails."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from serving.nucleus import without_sort
from serving.vllm_plugin import expand, register, unpinned
from tests.unit.test_nucleus import by_sorting

pytestmark = pytest.mark.vllm


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


def test_vllm_s_own_top_p_is_what_ours_is_tested_against():
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler", reason="needs vLLM")
    theirs = getattr(sampler.apply_top_k_top_p_pytorch, "__wrapped__", sampler.apply_top_k_top_p_pytorch)
    logits = (torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) * 6).round() / 2  # with ties
    p = torch.linspace(0.3, 1, 64)
    expected = theirs(logits.clone(), None, p, allow_cpu_sync=True)
    assert torch.equal(by_sorting(logits.clone(), None, p), expected)
    assert torch.equal(without_sort(theirs)(logits.clone(), None, p, allow_cpu_sync=True), expected)
