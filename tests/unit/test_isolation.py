"""Rows of a batch never see each other, and padding contributes nothing, whatever stands in it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from draft_training.features import FeatureStore
from draft_training.heads import FeatureBatch, list_heads
from draft_training.recipe import Objective
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target, shaken_head

K = 3
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


def has_token(batch: FeatureBatch, j: int) -> Tensor:
    """[B, Q] anchors whose draft position j reads a token of the row: what is drafted behind its end counts nowhere."""
    return batch.anchor_mask_BQ & (batch.anchors_BQ + 1 + j < batch.lengths_B[:, None])


def test_padding_changes_no_draft_no_loss_and_no_gradient(head, store):
    batch = store.batch([0, 1, 2])
    pads = torch.arange(max(LENGTHS)) >= batch.lengths_B[:, None]
    assert pads.any()
    found = []
    for each in (batch, with_garbage(batch, pads)):
        head.zero_grad()
        output = head.compute_loss(each, Objective(step_decay=0.8))
        output.loss.backward()
        found.append([output.loss.detach(), *(p.grad.clone() for p in head.parameters() if p.grad is not None)])
        drafts = head.draft_along(each)
        found[-1] += [drafts[..., j][has_token(batch, j)] for j in range(K)]
    torch.testing.assert_close(found[0], found[1])


def test_another_row_changes_nothing_of_this_one(head, store):
    batch = store.batch([0, 1, 2])
    others = (torch.arange(3) != 1)[:, None].expand(-1, max(LENGTHS))
    alone = store.batch([1])
    found = [
        [states[b][has_token(each, j)[b]] for j, (states, _) in enumerate(head.outputs(each))]
        for b, each in ((1, batch), (1, with_garbage(batch, others)), (0, alone))
    ]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_no_gradient_reaches_another_row_or_a_pad(head, store):
    batch = store.batch([0, 1, 2])
    batch.aux_hidden_BTAH.requires_grad_()
    batch.final_hidden_BTH.requires_grad_()
    sum(states[1][batch.anchor_mask_BQ[1]].square().sum() for states, _ in head.outputs(batch)).backward()
    grads = [t.grad for t in (batch.aux_hidden_BTAH, batch.final_hidden_BTH) if t.grad is not None and t.numel()]
    assert grads
    for grad in grads:
        assert not grad[[0, 2]].any() and not grad[1, LENGTHS[1] :].any()
        assert grad[1, : LENGTHS[1]].any()


def test_the_loss_of_a_batch_is_the_mean_over_its_rows_positions(head, store):
    together = head.compute_loss(store.batch([0, 1, 2]), Objective(step_decay=0.0))  # 0 ** 0 = 1: position 0 alone
    alone = [head.compute_loss(store.batch([i]), Objective(step_decay=0.0)) for i in range(3)]
    assert together.num_targets == [sum(each) for each in zip(*(o.num_targets for o in alone), strict=True)]
    mean = sum(o.loss * o.num_targets[0] for o in alone) / together.num_targets[0]
    torch.testing.assert_close(together.loss, mean)
