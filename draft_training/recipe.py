"""The choices of ``train.*`` that decide what is learnt, checked before anything expensive starts. No torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from specdec.config import TrainConfig
from specdec.device import Device, shards_weights

LOSSES = ("cross_entropy", "lk_hybrid", "lk_log")
KNOWN = {
    "loss": LOSSES,
    "position_weights": ("decay", "survival"),
    "optimizer": ("auto", "muon", "adamw"),
    "precision": ("auto", "bf16", "fp32"),
    "parallel": ("ddp", "fsdp"),
}


LEARNING_RATES = {"muon": 2e-3, "adamw": 1e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a draft position costs (``draft_training/loss.py``), and what each position weighs."""

    loss: str = "cross_entropy"
    lk_eta: float = 3.0
    position_weights: str = "decay"
    step_decay: float = 1.0
    survival_floor: float = 0.5

    @classmethod
    def of(cls, config: TrainConfig) -> Objective:
        """The part of the settings that the loss needs."""
        return cls(
            loss=config.loss,
            lk_eta=config.lk_eta,
            position_weights=config.position_weights,
            step_decay=config.step_decay,
            survival_floor=config.survival_floor,
        )


def settled(config: TrainConfig, device: Device) -> TrainConfig:
    """With the optimizer that works here in place of "auto", and its learning rate in place of none.

    Muon computes in bf16 and on whole matrices.
    """
    optimizer = config.optimizer
    if optimizer == "auto":
        optimizer = "muon" if device.native_bf16 and not shards_weights(config.parallel) else "adamw"
    rate = LEARNING_RATES[optimizer] if config.learning_rate is None else config.learning_rate
    return dataclasses.replace(config, optimizer=optimizer, learning_rate=rate)


def check_recipe(config: TrainConfig) -> None:
    """Refuse what no module knows.

    Raises:
        ValueError: names the setting and what it may be.
    """
    for name, known in KNOWN.items():
        if getattr(config, name) not in known:
            raise ValueError(f"train.{name} must be one of {', '.join(known)}; got {getattr(config, name)!r}")
    if not 0 < config.epochs < math.inf:
        raise ValueError(f"train.epochs must be a number above 0, got {config.epochs:g}")
    if not 0 <= config.survival_floor <= 1:
        raise ValueError(f"train.survival_floor must be from 0 to 1, got {config.survival_floor}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"train.ema must be at least 0 (no average) and below 1, got {config.ema}")
    if config.optimizer == "muon" and shards_weights(config.parallel):
        raise ValueError(
            "train.optimizer=muon needs whole matrices, and FSDP leaves each process a part of them: set "
            "train.parallel=ddp (and launch without FSDP), or train.optimizer=adamw"
        )
    if config.pack_tokens is not None and config.pack_tokens < 1:
        raise ValueError(f"train.pack_tokens must be at least 1, or null to pad rows, got {config.pack_tokens}")
    if config.accumulation_steps < 1:
        raise ValueError(f"train.accumulation_steps must be 1 or more, got {config.accumulation_steps}")
    for name in ("lk_eta", "lm_head_lr_scale"):
        if getattr(config, name) < 0:
            raise ValueError(f"train.{name} must not be negative, got {getattr(config, name)}")
