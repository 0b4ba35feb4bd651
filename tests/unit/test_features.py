"""Features in memory: few shapes, kept as they were computed, and the target gone when nothing is left to read."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from draft_training import features
from draft_training.feature_cache import FeatureCache
from draft_training.features import FeatureStore, Slabs
from draft_training.padding import padded_length
from draft_training.recipe import Objective
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import ReasoningTrace, TokenRow, tokenize_trace
from tests.tiny import save_tiny_target, shaken_head, tiny_tokenizer

TAPS = [1, 2]
CPU = Device(kind="cpu", core_ids=(0,), native_bf16=False)
FIELDS = ("aux_hidden", "final_hidden", "logsumexp", "argmax")


@pytest.fixture
def target(tmp_path) -> TargetModel:
    files = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path))))
    return TargetModel.load(files, "float32", CPU)


@pytest.fixture
def rows() -> list[TokenRow]:
    traces = [ReasoningTrace(prompt=f"{i}?", reasoning="so " * i, response=str(i)) for i in (1, 9, 30)]
    return [tokenize_trace(tiny_tokenizer(), trace) for trace in traces]


def test_lengths_are_rounded_to_a_few_and_by_little():
    lengths = range(1, 5000)
    assert all(length <= padded_length(length) <= 1.125 * length for length in lengths)
    assert all(padded_length(padded_length(length)) == padded_length(length) for length in lengths)
    assert len({padded_length(length) for length in range(1024, 4096)}) <= 2 * 8 + 1


def test_batches_of_alike_rows_have_one_shape(target, rows):
    store = FeatureStore(target, rows, TAPS, 2**30)
    for index in range(len(rows)):
        batch = store.batch([index])
        assert batch.final_hidden_BTH.shape[1] == padded_length(len(rows[index].input_ids))
        assert batch.anchors_BQ.shape[1] == padded_length(int(batch.anchor_mask_BQ.sum()))


def test_kept_features_are_the_computed_ones(target, rows, monkeypatch):
    monkeypatch.setattr(features, "SLAB_BYTES", 20_000)  # less than the longest row's
    store = FeatureStore(target, rows, TAPS, 2**30)
    store.fill(256, "features")
    computed = target.forward_rows([row.input_ids for row in rows], TAPS)
    kept = store.features([features.whole_row(i, row) for i, row in enumerate(rows)])
    for index, fresh in enumerate(computed):
        assert all(torch.equal(getattr(kept[index], name), getattr(fresh, name)) for name in FIELDS)
    storages = {getattr(part, name).untyped_storage().data_ptr() for part in kept.values() for name in FIELDS}
    assert len(storages) < len(rows) * len(FIELDS)  # together, not one by one


def test_slabs_keep_each_copy_apart():
    slabs = Slabs()
    originals = [torch.arange(n, dtype=dtype) for n in (1, 0, 7) for dtype in (torch.bfloat16, torch.int64)]
    copies = [slabs.copy(original) for original in originals]
    assert all(torch.equal(copy, original) for copy, original in zip(copies, originals, strict=True))


def test_a_target_that_has_read_all_rows_can_go(target, rows):
    store = FeatureStore(target, rows, TAPS, 2**30)
    assert not store.is_complete
    store.fill(256, "features")
    assert store.is_complete
    kept = (target.embedding.clone(), target.lm_head_weight.clone(), target.final_norm_weight.clone())
    before = store.batch([0, 1, 2])
    layer = weakref.ref(target.model.get_decoder().layers[0])
    target.drop_layers()
    gc.collect()
    assert layer() is None
    still = (target.embedding, target.lm_head_weight, target.final_norm_weight)
    assert all(torch.equal(a, b) for a, b in zip(kept, still, strict=True))
    assert torch.equal(store.batch([0, 1, 2]).final_hidden_BTH, before.final_hidden_BTH)


def test_a_store_with_too_small_a_bound_still_needs_the_target(target, rows):
    whole = FeatureStore(target, rows, TAPS, 2**30)
    whole.fill(256, "features")
    bounded = FeatureStore(target, rows, TAPS, whole.num_bytes - 1)
    bounded.fill(256, "features")
    assert 0 < bounded.num_bytes < whole.num_bytes and not bounded.is_complete


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # tied, untied
def test_a_head_on_kept_features_never_opens_the_targets_layers(rows, tmp_path, kind, monkeypatch):
    files = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path / "target", kind))))
    fingerprint, losses = files.fingerprint(), []
    for visit in range(2):
        target = TargetModel.load(files, "float32", CPU)
        if visit:
            monkeypatch.setattr(target, "_open_model", lambda: pytest.fail("the layers were opened"))
        cache = FeatureCache(tmp_path / "features", 2**30, fingerprint, torch.float32, rows)
        head = shaken_head("eagle3", target, 3)
        store = FeatureStore(target, rows, head.aux_layer_ids, 0, cache)
        store.fill(256, "features")
        loss = head.compute_loss(store.batch([0, 1, 2]), Objective()).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_a_target_without_its_embeddings_is_refused(target, tmp_path):
    [shard] = tmp_path.glob("*.safetensors")
    weights = {name: tensor for name, tensor in load_file(shard).items() if "embed_tokens" not in name}
    save_file(weights, shard)
    with pytest.raises(ValueError, match=r"lacks model\.embed_tokens\.weight in .*; download or save it again"):
        TargetModel.load(resolve_target(TargetConfig(name=str(tmp_path))), "float32", CPU)
