"""Rows of a batch never see each other, side by side or packed, and padding contributes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from draft_training.features import FeatureStore
from draft_training.heads import FeatureBatch, list_heads
from draft_training.recipe import Objective
from draft_training.selection import accepted_prefix
from draft_training.target_model import TargetModel
from draft_training.windows import anchor_positions, tiles, whole_row
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target, shaken_head

K = 6  # the last anchors' last drafts lie well inside of the next row of a strip
LENGTHS = (40, 23, 31)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    files = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path_factory.mktemp("target")))))
    return TargetModel.load(files, "float32", Device(kind="cpu", core_ids=(0,), native_bf16=False))


@pytest.fixture(params=list_heads())
def head(request, target):
    return shaken_head(request.param, target, K)


@pytest.fixture
def store(head, target) -> FeatureStore:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(0, 200, (length,), generator=generator).tolist()
        rows.append(
            TokenRow(
                conversation_id=str(length), prompt="", input_ids=ids, prompt_span=(0, 5), think_span=(5, 5),
                answer_span=(5, length), loss_mask=[0] * 5 + [1] * (length - 5),
            )
        )  # fmt: skip
    return FeatureStore(target, rows, head.aux_layer_ids, 2**30)


def with_garbage(batch: FeatureBatch, where: Tensor) -> FeatureBatch:
    """The batch with other ids, features and labels where ``where`` holds; the loss mask says what is learnt."""
    shaken = {}
    for name in ("input_ids_BT", "argmax_BT"):
        shaken[name] = torch.where(where, (getattr(batch, name) + 77) % 200, getattr(batch, name))
    for name in ("aux_hidden_BTAH", "final_hidden_BTH", "logsumexp_BT"):
        tensor = getattr(batch, name)
        shape = where.view(*where.shape, *[1] * (tensor.ndim - 2))
        shaken[name] = torch.where(shape, 30 * torch.randn_like(tensor), tensor)
    return dataclasses.replace(batch, **shaken)


def tokens_of(batch: FeatureBatch, row: int) -> Tensor:
    """[B, T] where the row stands: each is of another length."""
    return batch.ends_BT - batch.starts_BT == LENGTHS[row]


def anchors_of(batch: FeatureBatch, row: int, j: int) -> Tensor:
    """[B, Q] the row's anchors whose draft position j reads a token of it: what is drafted behind its end counts
    nowhere."""
    ends = batch.ends_BT.gather(1, batch.anchors_BQ)
    exists = batch.anchor_mask_BQ & (batch.anchors_BQ + 1 + j < ends)
    return exists & tokens_of(batch, row).gather(1, batch.anchors_BQ)


def loss_and_gradient(head, batch: FeatureBatch, objective: Objective) -> list[Tensor]:
    head.zero_grad()
    loss = head.compute_loss(batch, objective).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in head.parameters() if p.grad is not None)]


# One row a strip, a strip of all and a pad, and two strips.
LAYOUTS = pytest.mark.parametrize(("pack_tokens", "strips"), [(None, 3), (200, 1), (70, 2)])


def laid(store: FeatureStore, pack_tokens: int | None) -> FeatureBatch:
    return store.window_batch([whole_row(i, store.rows[i]) for i in range(3)], pack_tokens=pack_tokens)


@LAYOUTS
def test_a_batch_holds_each_row_once(store, pack_tokens, strips):
    batch = laid(store, pack_tokens)
    assert len(batch.input_ids_BT) == strips
    for i, row in enumerate(store.rows):
        assert batch.input_ids_BT[tokens_of(batch, i)].tolist() == row.input_ids
        assert batch.positions_BT[tokens_of(batch, i)].tolist() == list(range(LENGTHS[i]))
        anchors = batch.positions_BT.gather(1, batch.anchors_BQ)[anchors_of(batch, i, 0)]
        assert anchors.tolist() == anchor_positions(row)


@LAYOUTS
def test_padding_changes_no_draft_no_loss_and_no_gradient(head, store, pack_tokens, strips):
    batch = laid(store, pack_tokens)
    pads = batch.ends_BT == 0
    assert pads.any()
    found = []
    for each in (batch, with_garbage(batch, pads)):
        found.append(loss_and_gradient(head, each, Objective(step_decay=0.8)))
        drafts = head.draft_along(each)
        found[-1] += [drafts[..., j][anchors_of(batch, i, j)] for j in range(K) for i in range(3)]
    torch.testing.assert_close(found[0], found[1])


@LAYOUTS
def test_another_row_changes_nothing_of_this_one(head, store, pack_tokens, strips):
    batch, alone = laid(store, pack_tokens), store.batch([1])
    found = [
        [states[anchors_of(each, 1, j)] for j, (states, _) in enumerate(head.outputs(each))]
        for each in (batch, with_garbage(batch, ~tokens_of(batch, 1)), alone)
    ]
    assert all(len(states) for states in found[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@LAYOUTS
def test_no_gradient_reaches_another_row_or_a_pad(head, store, pack_tokens, strips):
    batch = laid(store, pack_tokens)
    batch.aux_hidden_BTAH.requires_grad_()
    batch.final_hidden_BTH.requires_grad_()
    own_anchors, own_tokens = anchors_of(batch, 1, 0), tokens_of(batch, 1)
    sum(states[own_anchors].square().sum() for states, _ in head.outputs(batch)).backward()
    grads = [t.grad for t in (batch.aux_hidden_BTAH, batch.final_hidden_BTH) if t.grad is not None and t.numel()]
    assert grads
    for grad in grads:
        assert not grad[~own_tokens].any()
        assert grad[own_tokens].any()


@LAYOUTS
def test_the_loss_of_a_batch_is_the_mean_over_its_rows_positions(head, store, pack_tokens, strips):
    together = head.compute_loss(laid(store, pack_tokens), Objective(step_decay=0.0))  # 0 ** 0 = 1: position 0 alone
    alone = [head.compute_loss(store.batch([i]), Objective(step_decay=0.0)) for i in range(3)]
    assert together.num_targets == [sum(each) for each in zip(*(o.num_targets for o in alone), strict=True)]
    assert together.num_correct == [sum(each) for each in zip(*(o.num_correct for o in alone), strict=True)]
    mean = sum(o.loss * o.num_targets[0] for o in alone) / together.num_targets[0]
    torch.testing.assert_close(together.loss, mean)


@pytest.mark.parametrize("pack_tokens", [1000, 60])
@pytest.mark.parametrize("prefix_tokens", [None, 0, 5])
def test_packed_windows_teach_what_padded_ones_do(head, store, pack_tokens, prefix_tokens):
    """Also where a row's first tokens are learnt from, right behind another row's last ones."""
    if hasattr(head, "feature_loss_weight"):
        head.feature_loss_weight = 0.5
    windows = [tiles(i, row, 9, K, prefix_tokens)[-1] for i, row in enumerate(store.rows)]
    for objective in (Objective(step_decay=0.8), Objective(loss="lk_hybrid", position_weights="survival")):
        padded, packed = (
            loss_and_gradient(head, store.window_batch(windows, pack_tokens=each), objective)
            for each in (None, pack_tokens)
        )
        torch.testing.assert_close(padded, packed)
    padded, packed = (store.window_batch(windows, pack_tokens=each) for each in (None, pack_tokens))
    assert len(packed.input_ids_BT) < len(padded.input_ids_BT)


@LAYOUTS
def test_nothing_is_accepted_behind_the_end_of_a_row(store, pack_tokens, strips):
    batch = laid(store, pack_tokens)
    last = batch.input_ids_BT.shape[1] - 1
    right = [batch.input_ids_BT.gather(1, (batch.anchors_BQ + 2 + j).clamp(max=last)) for j in range(K)]
    accepted = accepted_prefix(torch.stack(right, dim=-1), batch, on_policy=True)
    for i, length in enumerate(LENGTHS):
        wanted = [min(K, length - (t + 2)) for t in anchor_positions(store.rows[i])]
        assert accepted[anchors_of(batch, i, 0)].tolist() == wanted
