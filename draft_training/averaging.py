"""An exponential moving average of the weights: what is evaluated and exported when ``train.ema`` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Of ``head``'s trained parameters, in their own dtype; with a ``decay`` of 0 it holds nothing and does nothing.

    The decay grows as ``(1 + n) / (10 + n)`` with the number of updates n up to ``decay``, so that a short run's
    average isn't made of its first weights.
    """

    def __init__(self, head: nn.Module, decay: float) -> None:
        self.head, self.decay = head, decay
        self.num_updates = 0
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.head.named_parameters() if p.requires_grad and self.decay]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, parameter in self._parameters():
            self.averages[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The head has the averaged weights inside, and its own ones again after."""
        own = {name: p.detach().clone() for name, p in self._parameters()}
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            parameter.copy_(tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undoes ``state_dict``."""
        self.num_updates, self.averages = state["num_updates"], state["averages"]
