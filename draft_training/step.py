"""The gradient of one optimizer step, whoever and however many parts share its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from draft_training.distributed import Processes
from draft_training.features import FeatureStore
from draft_training.heads import FeatureBatch
from draft_training.recipe import Objective
from draft_training.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """Of one step, over all its parts and processes."""

    loss: float
    num_tokens: int
    top1_rates: list[float]  # by draft position: how often the head's argmax is the target's
    wishes: list[bool]  # which of them any process had


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientMaker:
    """Runs ``model`` (the head's loss, wrapped by ``processes``) on windows of ``store``."""

    head: Any
    model: nn.Module
    store: FeatureStore
    processes: Processes
    autocast: Callable[[], Any]
    objective: Objective
    accumulation_steps: int
    pack_tokens: int | None

    def run(self, windows: list[Window], wishes: Callable[[], list[bool]]) -> StepFigures:
        """Leave the gradient of these windows' loss in the head's parameters. Collective.

        The features of this process's share are held at once: what the loss divides by is counted over the whole
        step before its first part is computed. ``wishes`` is asked at the end.
        """
        shares = self.processes.parts_of_share(windows, self.accumulation_steps)
        parts = [self._features(share, windows) for share in shares]
        counts_2K = self.processes.sum(torch.stack([self.head.count_targets(part) for part in parts]).sum(0))
        loss, num_correct = 0.0, [0] * counts_2K.shape[1]
        for i, part in enumerate(parts):
            part.step_counts_2K = counts_2K
            with self.processes.accumulating(self.model, more_to_come=i + 1 < len(parts)):
                with self.autocast():
                    part_loss, part_correct = self.model(part, self.objective)
                self.processes.backward(part_loss)
            loss += float(part_loss.detach())
            num_correct = [a + b for a, b in zip(num_correct, part_correct, strict=True)]
        num_tokens = sum(window.num_tokens for share in shares for window in share)
        mine = torch.tensor([loss, num_tokens, *num_correct, *wishes()], dtype=torch.float64, device=counts_2K.device)
        loss, total_tokens, *counts = self.processes.sum(mine).tolist()
        num_targets = counts_2K[0].tolist()
        return StepFigures(
            loss=loss,
            num_tokens=int(total_tokens),
            top1_rates=[counts[j] / max(n, 1) for j, n in enumerate(num_targets)],
            wishes=[count > 0 for count in counts[len(num_targets) :]],
        )

    def _features(self, share: list[Window], windows: list[Window]) -> FeatureBatch:
        """Of an empty share, a window that counts for nothing: DDP and FSDP need every process in every pass."""
        batch = self.store.window_batch(share or windows[:1], pack_tokens=self.pack_tokens)
        if not share:
            batch.anchor_mask_BQ.zero_()
        return batch
