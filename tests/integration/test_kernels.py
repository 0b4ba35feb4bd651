"""Kernels of decode steps, with vLLM's own matrix products."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from serving import kernels
from serving.kernels import make, rows_of_decode_steps, with_kernels, with_more_rows


def test_rows_are_those_of_decode_steps_of_every_k():
    assert rows_of_decode_steps(3, 0) == [1, 2, 3]
    assert rows_of_decode_steps(3, 2) == list(range(1, 10))
    assert rows_of_decode_steps(256, 3)[-1] == kernels.MOST_ROWS


@pytest.fixture
def custom_ops(monkeypatch):
    """vLLM's, whose products are noted in ``asked``: rows, inputs, outputs."""
    platforms = pytest.importorskip("vllm.platforms", reason="needs vLLM")
    if not platforms.current_platform.is_cpu():
        pytest.skip("these kernels are the CPU build's")
    platforms.current_platform.import_kernels()
    from vllm import _custom_ops

    if not _custom_ops._supports_onednn:
        pytest.skip("this build of vLLM has no oneDNN")
    theirs, asked = _custom_ops.onednn_mm, []

    def noted(handler, x, bias):
        asked.append((len(x), handler.k, handler.n))
        return theirs(handler, x, bias)

    monkeypatch.setattr(_custom_ops, "onednn_mm", noted)
    return SimpleNamespace(module=_custom_ops, asked=asked)


def test_each_kind_of_matrix_meets_each_number_of_rows_once(custom_ops):
    create = with_more_rows(custom_ops.module.create_onednn_mm)
    weights = [torch.randn(64, 32), torch.randn(64, 32), torch.randn(32, 96)]
    handlers = [create(weight, 32) for weight in weights]
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=1),
            scheduler_config=SimpleNamespace(max_num_seqs=2),
        )
    )
    compiled = []
    with_kernels(compiled.append)(runner)
    assert compiled == [runner]
    assert sorted(custom_ops.asked) == [(rows, *kind) for rows in (1, 2, 3, 4) for kind in ((32, 96), (64, 32))]
    x = torch.randn(4, 64)
    torch.testing.assert_close(custom_ops.module.onednn_mm(handlers[1], x, None), x @ weights[1], rtol=1e-4, atol=1e-4)


def test_a_server_starts_without_them_where_they_cannot_be_made(monkeypatch):
    def refuse(rows):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(kernels, "make", refuse)
    config = SimpleNamespace(speculative_config=None, scheduler_config=SimpleNamespace(max_num_seqs=1))
    compiled = []
    with_kernels(compiled.append)(SimpleNamespace(vllm_config=config))
    assert len(compiled) == 1


def test_a_matrix_that_is_gone_is_not_asked(custom_ops):
    handler = with_more_rows(custom_ops.module.create_onednn_mm)(torch.randn(16, 80), 32)
    del handler
    gc.collect()
    make([3])
    assert (3, 16, 80) not in custom_ops.asked


def test_a_large_model_does_not_wait_for_all(custom_ops, monkeypatch):
    handler = with_more_rows(custom_ops.module.create_onednn_mm)(torch.randn(48, 64), 32)
    monkeypatch.setattr(kernels, "LONGEST_SEC", -1.0)
    make([1, 2])
    assert custom_ops.asked == []
    assert handler is not None
