"""A worker's part of a swap on small modules: what is read and refused, what is the target's, what comes back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from serving import head_weights
from serving.head_weights import Weights, own_modules, read, read_tensors, replace, settle, take_back

LAYOUT = {"fc.weight": ("BF16", [2, 4]), "d2t": ("I64", [3])}


def write(directory: Path, **changes: torch.Tensor) -> Path:
    tensors = {"fc.weight": torch.ones(2, 4).bfloat16(), "d2t": torch.arange(3)}
    save_file({**tensors, **changes}, directory / "model.safetensors")
    return directory


def make_worker() -> Any:
    """A target, and a head with a layer of its own that shares the target's embedding."""
    target = nn.ModuleDict({"embed": nn.Embedding(3, 2), "norm": nn.LayerNorm(2)})
    draft = nn.Module()
    draft.fc = nn.Linear(4, 2, bias=False)
    draft.register_buffer("mask", torch.zeros(2))
    draft.embed = target["embed"]
    runner = SimpleNamespace(get_model=lambda: target, get_draft_model=lambda: draft)
    return SimpleNamespace(model_runner=runner, draft=draft, target=target)


def fill(worker: Any, value: float) -> Any:
    def load(runner: Any, model: nn.Module, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            model.fc.weight.fill_(value)
            model.mask.fill_(value)

    return load


def test_tensors_are_read_whole_and_do_not_change_with_the_file(tmp_path):
    tensors = read_tensors(write(tmp_path), LAYOUT)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert tensors["fc.weight"].sum() == 8 and tensors["d2t"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("fc.weight", torch.ones(2, 4), "changed while it was read"),  # of another dtype
        ("fc.weight", torch.ones(4, 2).bfloat16(), "changed while it was read"),
        ("extra", torch.ones(1), "extra"),
        ("fc.weight", torch.tensor([[float("nan")] * 4] * 2).bfloat16(), "fc.weight holds numbers that are not finite"),
        ("fc.weight", torch.tensor([[float("inf")] * 4] * 2).bfloat16(), "not finite"),
    ],
)
def test_another_layout_and_numbers_that_are_none_are_refused(tmp_path, name, tensor, says):
    worker = make_worker()
    reason = read(worker, str(write(tmp_path, **{name: tensor})), LAYOUT)
    assert reason is not None and says in reason


def test_a_file_that_is_cut_after_it_was_checked_is_refused(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    assert "can't be read" in (read(make_worker(), str(tmp_path), LAYOUT) or "")


def test_a_head_with_an_embedding_of_its_own_would_overwrite_the_targets(tmp_path):
    layout = {**LAYOUT, "embed.weight": ("F32", [3, 2])}
    reason = read(make_worker(), str(write(tmp_path, **{"embed.weight": torch.ones(3, 2)})), layout)
    assert reason is not None and "its own embed.weight, but the running head shares the target's" in reason


def test_the_target_is_out_of_reach_while_weights_are_loaded():
    worker = make_worker()
    with pytest.raises(RuntimeError), own_modules(worker.model_runner) as model:
        assert [name for name, _ in model.named_parameters()] == ["fc.weight"]
        raise RuntimeError
    assert worker.draft.embed is worker.target["embed"]


def test_a_swap_can_be_taken_back_until_it_is_settled(tmp_path, monkeypatch):
    worker = make_worker()
    before = worker.draft.fc.weight.clone()
    place = worker.draft.fc.weight.data_ptr()
    for value in (1.0, 2.0):
        monkeypatch.setattr(head_weights, "load", fill(worker, value))
        assert read(worker, str(write(tmp_path)), LAYOUT) is None and replace(worker) is None
        assert worker.draft.fc.weight.unique().tolist() == [value]
    assert take_back(worker) is None  # to the last that was settled, not to the one before
    assert worker.draft.fc.weight.equal(before) and not worker.draft.mask.any()
    assert worker.draft.fc.weight.data_ptr() == place, "what has captured the address must see it"
    assert replace(worker) is None and settle(worker) is None and take_back(worker) is None
    assert worker.draft.fc.weight.unique().tolist() == [2.0]


def test_a_copy_that_fails_half_way_leaves_the_old_head(tmp_path, monkeypatch):
    worker = make_worker()
    before = worker.draft.fc.weight.clone()

    def fail(runner: Any, model: nn.Module, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            model.fc.weight.fill_(7.0)
        model.fc.weight = nn.Parameter(torch.empty(0))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(head_weights, "load", fail)
    assert read(worker, str(write(tmp_path)), LAYOUT) is None
    assert replace(worker) == "RuntimeError: out of memory"
    assert worker.draft.fc.weight.equal(before)
    assert worker.draft.embed is worker.target["embed"]


def test_packed_products_come_back_as_they_were():
    worker = make_worker()
    worker.draft.fc.cpu_linear = before = lambda x: x
    weights = Weights.of(worker.draft)
    worker.draft.fc.cpu_linear = lambda x: x + 1
    weights.put_back()
    assert worker.draft.fc.cpu_linear is before


def test_a_worker_without_a_head_answers_too():
    assert "AttributeError" in (replace(SimpleNamespace()) or "")
