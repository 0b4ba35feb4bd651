"""The fused losses against autograd on their formulas, in one chunk and in many; what positions weigh."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from draft_training import loss
from draft_training.draft_module import DraftModule
from draft_training.heads import FeatureBatch
from draft_training.recipe import LOSSES, Objective


def naive(logits, probs, objective: Objective):
    """[N], by the formulas of the module's docstring."""
    cross = -(probs * logits.log_softmax(-1)).sum(-1)
    overlap = torch.minimum(probs, logits.softmax(-1)).sum(-1)
    if objective.loss == "cross_entropy":
        return cross
    blend = torch.exp(-objective.lk_eta * overlap.detach())
    return blend * cross + (1 - blend) * (1 - overlap if objective.loss == "lk_hybrid" else -overlap.log())


@pytest.mark.parametrize("chunk_logits", [7 * 3, 10**6])  # three rows at a time, and all at once
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_do_not_depend_on_the_chunks(monkeypatch, chunk_logits, is_frozen, name):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(8, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=not is_frozen)
    probs = 0.8 * torch.randn(4, 7).softmax(-1)  # does not sum to 1: the rest lies outside the draft vocabulary
    ranks, weights = torch.tensor([0, 1, 2, 3, 3, 2, 0, 1]), torch.rand(8)
    objective = Objective(loss=name, lk_eta=2.0)

    fused, best, accepted = loss.DraftLoss.apply(hidden, weight, probs, ranks, weights, objective)
    (2 * fused).backward()
    gradients = [tensor.grad for tensor in (hidden, weight)]
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    plain = (weights * naive(logits, probs[ranks], objective)).sum()
    (2 * plain).backward()
    torch.testing.assert_close(fused, plain)
    assert torch.equal(best, logits.argmax(-1))
    assert torch.equal(accepted, probs[ranks, logits.argmax(-1)])
    torch.testing.assert_close(gradients[0], hidden.grad)
    if is_frozen:
        assert gradients[1] is None
    else:
        torch.testing.assert_close(gradients[1], weight.grad)


def test_the_gradient_of_every_loss_is_its_slope():
    """Against differences in double precision, so that the formula's own gradient is not taken on trust."""
    torch.manual_seed(1)
    logits, probs = torch.randn(3, 6, dtype=torch.double), 0.9 * torch.randn(3, 6, dtype=torch.double).softmax(-1)
    for name in LOSSES:
        objective = Objective(loss=name, lk_eta=100.0)  # what a changing blend adds is nothing here
        _, gradient = loss._loss_and_gradient(logits.clone(), probs, objective)
        for n in range(3):
            for v in range(6):
                step = torch.zeros_like(logits)
                step[n, v] = 1e-6
                up, down = (loss._loss_and_gradient(logits + s, probs, objective)[0] for s in (step, -step))
                assert float((up - down)[n] / 2e-6) == pytest.approx(float(gradient[n, v]), abs=1e-6)


def test_likelihood_losses_are_finite_where_nothing_overlaps():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    probs = torch.tensor([[0.0, 0.5, 0.5]])
    for name in ("lk_hybrid", "lk_log"):
        arguments = (probs, torch.tensor([0]), torch.ones(1), Objective(loss=name))
        value, _, _ = loss.DraftLoss.apply(logits, torch.eye(3), *arguments)
        [gradient] = torch.autograd.grad(value, logits)
        assert value.isfinite() and gradient.isfinite().all()
        assert gradient[0, 0] > 0 > gradient[0, 1]  # cross-entropy leads to where there is overlap


class PresetHead(DraftModule):
    """Its states at each position are given."""

    def __init__(self, lm_head_weight, states):
        super().__init__(SimpleNamespace(lm_head_weight=lm_head_weight), torch.arange(4), [], len(states))
        self.states = states

    def outputs(self, inputs, own_drafts=False):
        return iter([(each[None], torch.eye(4)) for each in self.states])


def preset_batch(logits) -> FeatureBatch:
    """One row of completion tokens alone, whose target has these logits over five tokens."""
    length = len(logits)
    return FeatureBatch(
        input_ids_BT=torch.arange(length)[None] % 4,
        anchors_BQ=torch.tensor([[0, 1]]),
        anchor_mask_BQ=torch.ones(1, 2, dtype=torch.bool),
        aux_hidden_BTAH=torch.zeros(1, length, 0, 5),
        final_hidden_BTH=logits[None],
        loss_mask_BT=torch.ones(1, length, dtype=torch.bool),
        positions_BT=torch.arange(length)[None],
        starts_BT=torch.zeros(1, length, dtype=torch.long),
        ends_BT=torch.full((1, length), length),
        logsumexp_BT=logits.logsumexp(-1)[None],
        argmax_BT=logits.argmax(-1)[None],
    )


@pytest.mark.parametrize("weights", ["decay", "survival"])
def test_positions_weigh_what_is_accepted_before_them(weights):
    torch.manual_seed(2)
    logits = torch.randn(6, 5)  # token 4 can't be drafted
    logits[:, 4] -= 2
    logits[2, 4] = 9.0  # the label of anchor 0's second draft, and of anchor 1's first: out of the vocabulary
    states = torch.randn(3, 2, 4)
    objective = Objective(position_weights=weights, step_decay=0.7, survival_floor=0.25)
    output = PresetHead(torch.eye(5), states).compute_loss(preset_batch(logits), objective)

    probs = logits.softmax(-1)
    wanted = torch.zeros(())
    for j in range(3):
        terms = []
        for q in range(2):
            weight = 0.7**j
            if weights == "survival":
                weight = 1.0
                for i in range(j):
                    can_be_right = logits[q + 1 + i].argmax() != 4
                    accepted = float(probs[q + 1 + i, states[i, q].argmax()]) if can_be_right else 0.0
                    weight *= 0.25 + 0.75 * accepted
            if logits[q + 1 + j].argmax() != 4:
                terms.append(-weight * (probs[q + 1 + j, :4] * states[j, q].log_softmax(-1)).sum())
        wanted += torch.stack(terms).mean()
    assert output.num_targets == [1, 1, 2]
    torch.testing.assert_close(output.loss, wanted)
