"""What is settled by the machine: the optimizer, and its learning rate."""

from __future__ import annotations

import pytest

from draft_training.recipe import settled
from specdec.config import TrainConfig
from specdec.device import Device

OLD_CPU = Device(kind="cpu", core_ids=(0,), native_bf16=False)
NEW_CPU = Device(kind="cpu", core_ids=(0,), native_bf16=True)


@pytest.mark.parametrize(
    ("device", "settings", "optimizer", "learning_rate"),
    [
        (NEW_CPU, {}, "muon", 2e-3),
        (OLD_CPU, {}, "adamw", 1e-3),
        (OLD_CPU, {"optimizer": "muon"}, "muon", 2e-3),
        (NEW_CPU, {"optimizer": "adamw"}, "adamw", 1e-3),
        (NEW_CPU, {"learning_rate": 0.0}, "muon", 0.0),
    ],
)
def test_a_recipe_is_settled_by_the_machine(device, settings, optimizer, learning_rate):
    config = settled(TrainConfig(**settings), device)
    assert (config.optimizer, config.learning_rate) == (optimizer, learning_rate)
    assert settled(config, OLD_CPU) == config  # once is for good


@pytest.mark.parametrize(("parallel", "optimizer"), [("ddp", "muon"), ("fsdp", "adamw")])
def test_shards_of_matrices_are_not_muons(monkeypatch, parallel, optimizer):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settled(TrainConfig(parallel=parallel), NEW_CPU).optimizer == optimizer
