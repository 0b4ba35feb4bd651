"""AdamW, or Muon on the matrices and AdamW on the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

BETAS = (0.9, 0.95)


class MuonAdamW(Optimizer):
    """Two optimisers that look like one: ``matrix_groups`` go to Muon, the other groups to AdamW.

    Muon's steps are scaled to the size of AdamW's (*Muon is Scalable for LLM Training*, arXiv 2502.16982), so both read
    the same learning rate and weight decay.
    """

    def __init__(self, matrix_groups: list[dict[str, Any]], other_groups: list[dict[str, Any]]) -> None:
        self.parts = {
            "muon": Muon(matrix_groups, adjust_lr_fn="match_rms_adamw"),
            "adamw": AdamW(other_groups, betas=BETAS, fused=True),
        }
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own dictionaries: a learning rate written here is read there."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each part under its name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undoes ``state_dict``."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self.param_groups = self._groups()


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """``adamw``, or ``muon``: on the groups whose ``kind`` is "matrix", with AdamW on the others."""
    if name == "adamw":
        return AdamW(groups, betas=BETAS, fused=True)
    matrices = [group for group in groups if group["kind"] == "matrix"]
    return MuonAdamW(matrices, [group for group in groups if group["kind"] != "matrix"])
