"""Long rows in windows: each position is reached, at its true place, with the whole prefix, in bounded memory."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draft_training import layers, selection
from draft_training.collate import MAX_OPEN_STRIPS, strip_tokens, strips
from draft_training.features import FeatureStore
from draft_training.heads import list_heads
from draft_training.recipe import Objective
from draft_training.selection import held_out_acceptance
from draft_training.target_model import TargetModel
from draft_training.trainer import plan_batches
from draft_training.windows import Coverage, Window, anchor_positions, coverage, draw, plan_windows, tiles, whole_row
from specdec.config import TargetConfig, TrainConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target, shaken_head

K = 3
LONG = 2048


def make_row(seed: int, length: int, prompt: int = 6) -> TokenRow:
    ids = torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = (prompt + length) // 2
    return TokenRow(
        conversation_id=str(seed), prompt=str(seed), input_ids=ids, prompt_span=(0, prompt),
        think_span=(prompt, middle), answer_span=(middle, length), loss_mask=[0] * prompt + [1] * (length - prompt),
    )  # fmt: skip


def of_length(row: int, length: int) -> Window:
    return Window(row=row, begin=0, end=length, first=0, stop=length, num_anchors=1)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    directory = save_tiny_target(tmp_path_factory.mktemp("target"), max_position_embeddings=LONG)
    files = resolve_target(TargetConfig(name=str(directory)))
    return TargetModel.load(files, "float32", Device(kind="cpu", core_ids=(0,), native_bf16=False))


@pytest.fixture(params=list_heads())
def head(request, target):
    return shaken_head(request.param, target, K)


@pytest.mark.parametrize("length", [2, 3, 30, 31, 200])
@pytest.mark.parametrize("phase", [0, 1, 7, 16])
def test_the_windows_of_a_row_hold_each_anchor_once(length, phase):
    row = make_row(0, length, prompt=1)
    anchors = anchor_positions(row)
    windows = tiles(5, row, 16, K, prefix_tokens=10, phase=phase)
    reached = [t for window in windows for t in anchors if window.first <= t < window.stop]
    assert reached == anchors
    assert sum(window.num_anchors for window in windows) == len(anchors)
    if len(anchors) <= 16:
        assert windows == [whole_row(5, row)]
        return
    for window in windows:
        assert 0 < window.num_anchors <= 16
        assert window.begin == max(0, window.first - 10)
        assert window.end == min(length, window.stop + 1 + K)  # the last anchor t drafts tokens up to t + 1 + K


def test_all_windows_are_drawn_before_one_comes_again_and_the_seed_decides_which():
    rows = [make_row(0, 100), make_row(1, 20), make_row(2, 77)]
    config = TrainConfig(window_tokens=16, epochs=40)
    planned = plan_windows(rows, config, K)
    epochs = [draw(planned, 0, epoch) for epoch in range(40)]
    for index, windows in enumerate(planned):
        times = Counter(epoch[index] for epoch in epochs)
        assert set(times) == set(windows) and max(times.values()) - min(times.values()) <= 1
    assert len({epoch[0].first for epoch in epochs}) > 3
    assert [draw(planned, 0, epoch) for epoch in range(40)] == epochs
    assert [draw(planned, 1, epoch) for epoch in range(40)] != epochs
    offsets = {plan_windows(rows, TrainConfig(window_tokens=16, seed=seed), K)[0][1].first for seed in range(20)}
    assert len(offsets) > 8  # of 16


def test_what_the_epochs_reach_is_counted():
    rows = [make_row(0, 6 + 100 + 1), make_row(1, 6 + 10 + 1)]  # 100 and 10 anchors

    def reached(epochs: float) -> Coverage:
        config = TrainConfig(window_tokens=20, epochs=epochs)
        planned = plan_windows(rows, config, K)
        return coverage(planned, plan_batches(planned, config))

    few = reached(2)
    assert (few.num_rows, few.num_windowed_rows, few.num_positions) == (2, 1, 110)
    assert 10 + 2 <= few.num_covered <= 10 + 40 and few.share == few.num_covered / 110
    assert reached(6).share == 1.0


@pytest.mark.parametrize(("name", "value"), [("window_tokens", 0), ("prefix_tokens", -1)])
def test_windows_of_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"train.{name} must be at least"):
        plan_windows([], TrainConfig(**{name: value}), K)


def test_each_epoch_draws_each_row_once_and_pads_little():
    rng = random.Random(0)
    lengths = [min(16000, max(60, int(rng.lognormvariate(7.2, 0.8)))) for _ in range(1500)]  # as R1 thinks
    for batch_tokens in (1024, 8192, 32768):
        config = TrainConfig(epochs=2, batch_tokens=batch_tokens)
        batches = plan_batches([[of_length(i, length)] for i, length in enumerate(lengths)], config)
        assert sorted(w.row for batch in batches for w in batch) == sorted([*range(len(lengths))] * 2)
        padded = sum(max(w.num_tokens for w in batch) * len(batch) for batch in batches)
        assert sum(lengths) * 2 / padded > 0.95
        assert all(
            len(batch) == 1 or max(w.num_tokens for w in batch) * len(batch) <= batch_tokens for batch in batches
        )


@given(st.lists(st.integers(1, 40), max_size=300), st.integers(1, 60))
def test_strips_hold_each_window_once_and_have_no_room_for_the_next(lengths, pack_tokens):
    windows = [of_length(i, length) for i, length in enumerate(lengths)]
    laid = strips(windows, pack_tokens)
    assert sorted(w.row for strip in laid for w in strip) == list(range(len(windows)))
    assert all(len(strip) == 1 or strip_tokens(strip) <= pack_tokens for strip in laid)
    if len(laid) <= MAX_OPEN_STRIPS:
        assert all(
            strip_tokens(earlier) + strip[0].num_tokens > pack_tokens
            for i, strip in enumerate(laid)
            for earlier in laid[:i]
        )
        assert strips([window for strip in laid for window in strip], pack_tokens) == laid
    assert strips(windows, None) == [[window] for window in windows]


def test_packed_batches_are_full_and_drawn_at_random():
    rng = random.Random(0)
    lengths = [min(4000, max(60, int(rng.lognormvariate(6.2, 0.8)))) for _ in range(1500)]
    planned = [[of_length(i, length)] for i, length in enumerate(lengths)]
    config = TrainConfig(epochs=2, batch_tokens=8192, pack_tokens=4096)
    batches = plan_batches(planned, config)
    assert sorted(w.row for batch in batches for w in batch) == sorted([*range(len(lengths))] * 2)
    laid = [strips(batch, 4096) for batch in batches]
    padded = sum(max(map(strip_tokens, each)) * len(each) for each in laid)
    assert all(max(map(strip_tokens, each)) * len(each) <= 8192 for each in laid)
    assert sum(lengths) * 2 / padded > 0.97 and sum(lengths) * 2 / len(batches) > 0.95 * 8192
    spread = [max(w.num_tokens for w in batch) / min(w.num_tokens for w in batch) for batch in batches]
    assert statistics.median(spread) > 5  # a padded batch holds rows of like length


def test_a_broken_epoch_is_the_first_part_of_a_whole_one():
    config = TrainConfig(epochs=3, batch_tokens=256)
    planned = plan_windows([make_row(i, 20 + i) for i in range(40)], config, K)
    whole = plan_batches(planned, config)
    per_epoch = len(whole) // 3
    part = plan_batches(planned, dataclasses.replace(config, epochs=1.5))
    assert part == whole[: len(part)] and len(part) == pytest.approx(1.5 * per_epoch, abs=1)
    assert len(plan_batches(planned, dataclasses.replace(config, epochs=0.01))) == 1


def test_windows_draft_and_learn_what_the_whole_row_does(head, target):
    row = make_row(3, 90)
    store = FeatureStore(target, [row], head.aux_layer_ids, 2**30)
    whole = store.batch([0])
    wanted = head.compute_loss(whole, Objective(step_decay=0.0))  # 0 ** 0 = 1: position 0 alone
    windows = tiles(0, row, 17, K, phase=5)
    batches = [store.window_batch([window]) for window in windows]
    assert len(windows) > 4 and len({window.first for window in windows}) == len(windows)
    drafts = torch.cat([head.draft_along(batch)[batch.anchor_mask_BQ] for batch in batches])
    anchors = whole.anchors_BQ[whole.anchor_mask_BQ]
    reads_a_token = anchors[:, None] + 1 + torch.arange(K) < len(row.input_ids)
    assert torch.equal(drafts[reads_a_token], head.draft_along(whole)[whole.anchor_mask_BQ][reads_a_token])
    outputs = [head.compute_loss(batch, Objective(step_decay=0.0)) for batch in batches]
    assert [sum(each) for each in zip(*(o.num_targets for o in outputs), strict=True)] == wanted.num_targets
    assert [sum(each) for each in zip(*(o.num_correct for o in outputs), strict=True)] == wanted.num_correct
    mean = sum(o.loss * o.num_targets[0] for o in outputs) / wanted.num_targets[0]
    torch.testing.assert_close(mean, wanted.loss)


def test_a_bounded_prefix_keeps_true_positions_and_full_features(head, target):
    row = make_row(4, 80)
    store = FeatureStore(target, [row], head.aux_layer_ids, 0)
    read: list[int] = []
    forward_rows = target.forward_rows
    target.forward_rows = lambda rows, ids: read.extend(map(len, rows)) or forward_rows(rows, ids)  # type: ignore
    window = tiles(0, row, 10, K, prefix_tokens=7)[4]
    try:
        batch = store.window_batch([window])
    finally:
        del target.forward_rows
    assert read == [window.end] and window.begin > 0  # computed from the row's start, and no further than needed
    [full] = target.forward_rows([row.input_ids], head.aux_layer_ids)
    part = slice(window.begin, window.end)
    real = slice(window.num_tokens)  # the rest is padding
    torch.testing.assert_close(batch.final_hidden_BTH[0, real], full.final_hidden[part])
    torch.testing.assert_close(batch.aux_hidden_BTAH[0, real], full.aux_hidden[part])
    assert batch.input_ids_BT[0, real].tolist() == row.input_ids[part]
    asked = []
    for module in head.modules():
        if isinstance(module, layers.PrefixAttention):
            module.rotary.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1][0].tolist()))
    list(head.outputs(batch))
    if hasattr(head, "layers"):  # it attends
        anchors = range(window.first, window.stop)

        def asked_for(positions: list[int]) -> bool:
            return any(each[: len(positions)] == positions for each in asked)

        assert asked_for(list(range(window.begin, window.end)))  # keys
        assert all(asked_for([t + j for t in anchors]) for j in range(K))  # queries of each draft position


@pytest.mark.parametrize("pack_tokens", [None, 100])
@pytest.mark.parametrize(("name", "limit"), [("MAX_SCORES", 1500), ("STRETCH_ANCHORS", 7)])
def test_attention_in_stretches_gives_the_same_loss_and_gradient(head, target, monkeypatch, name, limit, pack_tokens):
    store = FeatureStore(target, [make_row(5, 50), make_row(6, 33)], head.aux_layer_ids, 2**30)
    windows = [whole_row(i, row) for i, row in enumerate(store.rows)]
    found = []
    for each in (getattr(layers, name), limit):
        monkeypatch.setattr(layers, name, each)
        head.zero_grad()
        loss = head.compute_loss(store.window_batch(windows, pack_tokens=pack_tokens), Objective(step_decay=0.8)).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in head.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1])


def test_what_no_anchor_of_a_stretch_can_see_is_not_scored(target, monkeypatch):
    head = shaken_head("eagle3", target, K)
    store = FeatureStore(target, [make_row(5, 400), make_row(6, 400)], head.aux_layer_ids, 2**30)
    windows = [whole_row(i, row) for i, row in enumerate(store.rows)]
    monkeypatch.setattr(layers, "STRETCH_ANCHORS", 50)

    def num_scored(pack_tokens: int | None) -> int:
        batch = store.window_batch(windows, pack_tokens=pack_tokens)
        stretches = head.layers[0].self_attn.stretches(batch.anchors_BQ, batch.starts_BT, K - 1, torch.float32)
        assert sum(stretch.bias_BQT.shape[1] for stretch in stretches) == batch.anchors_BQ.shape[1]
        return sum(stretch.bias_BQT.numel() for stretch in stretches)

    assert num_scored(None) < 0.65 * 2 * 400 * 400  # dense: all of both rows
    assert num_scored(1000) < 0.35 * 800 * 800  # dense: all of the strip


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return made


def test_a_long_row_is_trained_on_and_measured_in_bounded_memory(head, target, monkeypatch):
    monkeypatch.setattr(selection, "WINDOW_TOKENS", 128)
    row = make_row(7, LONG)
    window = draw(plan_windows([row], TrainConfig(window_tokens=128), K), 0, 0)[0]
    with Largest() as largest:
        store = FeatureStore(target, [row], head.aux_layer_ids, 0)
        head.compute_loss(store.window_batch([window]), Objective(step_decay=0.8)).loss.backward()
        total = held_out_acceptance(head, store, False, 1024).total
    assert total.num_drafts > LONG / (K + 1) - 2  # the whole row was walked
    assert LONG * 64 <= largest.numel < LONG * LONG / 4  # dense scores would take twice its square


def test_measured_in_windows_or_whole_the_acceptance_is_the_same(head, target, monkeypatch):
    rows = [make_row(8, 90), make_row(9, 30), make_row(10, 61)]
    store = FeatureStore(target, rows, head.aux_layer_ids, 2**30)
    found = []
    for size in (1024, 13):
        monkeypatch.setattr(selection, "WINDOW_TOKENS", size)
        found.append(held_out_acceptance(head, store, False, 256))
    assert found[0] == found[1]
    assert set(found[0].by_output_position) == {0, 32, 64}
    assert sum(counts.num_drafts for counts in found[0].by_output_position.values()) == found[0].total.num_drafts
    assert sum(counts.num_accepted_tokens for counts in found[0].by_span.values()) == found[0].total.num_accepted_tokens
