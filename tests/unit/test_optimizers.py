"""Which parameter is moved by what, averages of weights, and states that survive being saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from draft_training.averaging import WeightAverage
from draft_training.draft_module import DraftModule
from draft_training.optimizers import MuonAdamW, make_optimizer

NAMES = ("fc.weight", "norm.weight", "lm_head.weight")


class SmallHead(nn.Module):
    """A matrix, a vector and an lm_head, under the names that heads give them."""

    parameter_groups = DraftModule.parameter_groups

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.lm_head = nn.Linear(6, 4, bias=False), nn.RMSNorm(4), nn.Linear(4, 9, bias=False)

    def forward(self, inputs):
        return self.lm_head(self.norm(self.fc(inputs)))


def small_head() -> SmallHead:
    torch.manual_seed(0)
    return SmallHead()


def steps(head, optimizer, number, start=0, average=None):
    for i in range(start, start + number):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(i))
        head(inputs).logsumexp(-1).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update()


def test_muon_moves_the_matrices_and_adamw_the_rest():
    head, reference = small_head(), small_head()
    steps(head, make_optimizer("muon", head.parameter_groups(0.02, 0.5, 0.1)), 1)
    steps(reference, make_optimizer("adamw", reference.parameter_groups(0.02, 0.5, 0.1)), 1)
    before = small_head().state_dict()
    after, wanted = head.state_dict(), reference.state_dict()
    assert torch.equal(after["lm_head.weight"], wanted["lm_head.weight"])
    assert torch.equal(after["norm.weight"], wanted["norm.weight"])
    # Muon's update has singular values near 1, scaled to 0.2 * sqrt(6) * lr; AdamW's first has entries of +-lr.
    update = (after["fc.weight"] - before["fc.weight"] * (1 - 0.02 * 0.1)) / (0.02 * 0.2 * 6**0.5)
    assert torch.linalg.svdvals(update).min() > 0.4 and torch.linalg.svdvals(update).max() < 1.6


def test_learning_rates_set_from_outside_reach_both_parts_also_after_loading():
    head = small_head()
    optimizer = make_optimizer("muon", head.parameter_groups(0.02, 1.0, 0.0))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(head, optimizer, 1)
    assert all(torch.equal(head.state_dict()[name], small_head().state_dict()[name]) for name in NAMES)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_optimizer_and_average_go_on_exactly(name, tmp_path):
    whole = small_head()
    optimizer, average = make_optimizer(name, whole.parameter_groups(0.02, 1.0, 0.1)), WeightAverage(whole, 0.9)
    steps(whole, optimizer, 3, average=average)
    saved = {"w": whole.state_dict(), "o": optimizer.state_dict(), "a": average.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    steps(whole, optimizer, 3, start=3, average=average)

    cut = small_head()
    optimizer = make_optimizer(name, cut.parameter_groups(0.02, 1.0, 0.1))
    resumed = WeightAverage(cut, 0.9)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    cut.load_state_dict(state["w"])
    optimizer.load_state_dict(state["o"])
    resumed.load_state_dict(state["a"])
    steps(cut, optimizer, 3, start=3, average=resumed)
    for parameter in NAMES:
        assert torch.equal(whole.state_dict()[parameter], cut.state_dict()[parameter])
        assert torch.equal(average.averages[parameter], resumed.averages[parameter])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_scale_of_zero_freezes_the_lm_head(name):
    head = small_head()
    optimizer = make_optimizer(name, head.parameter_groups(0.02, 0.0, 0.1))
    steps(head, optimizer, 3)
    assert torch.equal(head.lm_head.weight, small_head().lm_head.weight)
    assert head.lm_head.weight.grad is None  # nor does its gradient weigh in when gradients are clipped
    assert not torch.equal(head.fc.weight, small_head().fc.weight)


def test_the_average_follows_its_formula_and_is_only_lent_to_the_head():
    head = small_head()
    optimizer, average = make_optimizer("adamw", head.parameter_groups(0.02, 1.0, 0.0)), WeightAverage(head, 0.2)
    wanted = head.fc.weight.detach().clone()
    for n in range(4):
        steps(head, optimizer, 1, start=n, average=average)
        decay = min(0.2, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * head.fc.weight.detach()
    own = head.fc.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(head.fc.weight.detach(), wanted)
        assert not torch.equal(head.fc.weight, own)
    assert torch.equal(head.fc.weight, own)


def test_without_a_decay_nothing_is_kept():
    head = small_head()
    average = WeightAverage(head, 0.0)
    average.update()
    with average.applied():
        assert torch.equal(head.fc.weight, small_head().fc.weight)
    assert average.averages == {}


def test_muon_is_a_torch_optimizer():
    optimizer = make_optimizer("muon", small_head().parameter_groups(0.02, 1.0, 0.0))
    assert isinstance(optimizer, MuonAdamW) and isinstance(optimizer, torch.optim.Optimizer)
    assert [group["kind"] for group in optimizer.param_groups] == ["matrix", "vector", "lm_head"]
