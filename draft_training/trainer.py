"""The one training loop. It knows the head protocol and no architecture's name."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from draft_training.averaging import WeightAverage
from draft_training.checkpoint import load_checkpoint, save_checkpoint
from draft_training.features import FeatureStore, length_groups
from draft_training.interrupt import Interrupted
from draft_training.optimizers import make_optimizer
from draft_training.recipe import Objective
from draft_training.selection import held_out_acceptance
from draft_training.windows import Tiles, Window, coverage, draw, plan_windows
from specdec.config import TrainConfig
from specdec.progress import progress_bar

logger = logging.getLogger(__name__)

POOL_BATCHES = 32  # at least: with 64 rows a pool, batches of 32k tokens of R1 traces were a fifth padding, now 4 %


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Where a run stands; saved and restored whole, so that a resumed run ends as an uninterrupted one."""

    step: int = 0
    best_acceptance_length: float = 0.0
    best_step: int = -1
    train_sec: float = 0.0
    num_tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def plan_batches(planned: list[Tiles], config: TrainConfig) -> list[list[Window]]:
    """All batches of all epochs, from the seed alone: the data position is a step number."""
    batches = []
    for epoch in range(config.epochs):
        rng = random.Random(f"{config.seed}/{epoch}")
        order = draw(planned, config.seed, epoch)
        rng.shuffle(order)
        # Sorting whole pools by length keeps padding low without ordering the epoch by length.
        num_tokens = sum(window.num_tokens for window in order)
        num_pools = max(1, num_tokens // (POOL_BATCHES * config.batch_tokens))
        size = math.ceil(len(order) / num_pools)
        slices = [order[i : i + size] for i in range(0, len(order), size)]
        pools = [sorted(members, key=lambda window: window.num_tokens) for members in slices]
        groups = [g for members in pools for g in length_groups(members, lambda w: w.num_tokens, config.batch_tokens)]
        rng.shuffle(groups)
        batches += groups
    return batches


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class Trainer:
    """Trains ``head`` on ``train_store``, picks the checkpoint by acceptance on ``val_store``."""

    def __init__(
        self,
        head: Any,
        train_store: FeatureStore,
        val_store: FeatureStore,
        config: TrainConfig,
        precision: str,
        on_policy: bool,
        work_dir: Path,
        identity: str,
        measure_start: bool = False,
    ) -> None:
        """``measure_start``: the weights to start from are a candidate for the best."""
        self.measure_start = measure_start
        self.head, self.train_store, self.val_store = head, train_store, val_store
        self.config, self.on_policy, self.work_dir, self.identity = config, on_policy, work_dir, identity
        planned = plan_windows(train_store.rows, config, head.num_speculative_tokens)
        self.batches, self.coverage = plan_batches(planned, config), coverage(planned, config)
        groups = head.parameter_groups(config.learning_rate, config.lm_head_lr_scale, config.weight_decay)
        self.optimizer = make_optimizer(config.optimizer, groups)
        self.average = WeightAverage(head, config.ema)
        self.objective = Objective.of(config)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.state = TrainState()
        self.best_weights: dict[str, torch.Tensor] = {}
        device_type = train_store.target.device.type
        # Masters stay float32; autocast only narrows the matrix products.
        self.autocast: Callable[[], Any] = (
            (lambda: torch.autocast(device_type, torch.bfloat16)) if precision == "bf16" else nullcontext
        )
        self._stop = False

    @property
    def eval_steps(self) -> set[int]:
        """Steps after which the held-out acceptance is measured; the last one always."""
        total = len(self.batches)
        return {round(total * (i + 1) / self.config.num_evals) for i in range(self.config.num_evals)} | {total}

    def run(self) -> None:
        """Train to the end (resuming where an earlier run stopped); leaves the best weights in ``head``.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after the checkpoint is written.
            ValueError: the loss is no longer finite; the last checkpoint is kept.
        """
        self._resume()
        previous = {sig: signal.signal(sig, self._request_stop) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop()
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
        self.head.load_state_dict(self.best_weights)

    def _loop(self) -> None:
        total, state, eval_steps = len(self.batches), self.state, self.eval_steps
        if self.measure_start and state.step == 0:
            self._evaluate()
        last_save = time.monotonic()
        with progress_bar("training", total) as advance:
            advance(state.step)
            while state.step < total:
                started = time.monotonic()
                batch_tokens, note = self._train_step(self.batches[state.step])
                state.step += 1
                state.num_tokens += batch_tokens
                state.train_sec += time.monotonic() - started
                advance(1, f"{note} {state.num_tokens / state.train_sec:.0f} tok/s")
                if state.step in eval_steps:
                    with self.average.applied():
                        self._evaluate()
                if self._stop or state.step == total or time.monotonic() - last_save > self.config.checkpoint_every_sec:
                    self._save()
                    last_save = time.monotonic()
                if self._stop and state.step < total:
                    raise Interrupted

    def _train_step(self, windows: list[Window]) -> tuple[int, str]:
        factor = learning_rate_factor(self.state.step, len(self.batches), self.config.warmup_fraction)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        batch = self.train_store.window_batch(windows)
        with self.autocast():
            output = self.head.compute_loss(batch, self.objective)
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} at step {self.state.step}; the last checkpoint is kept in "
                f"{self.work_dir}: lower train.learning_rate and start again with another --out"
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        hits = "/".join(f"{c / max(n, 1):.2f}" for c, n in zip(output.num_correct, output.num_targets, strict=True))
        return int(batch.lengths_B.sum()), f"loss {loss:.3f} top-1 {hits}"

    def _evaluate(self) -> None:
        acceptance = held_out_acceptance(self.head, self.val_store, self.on_policy, self.config.batch_tokens).total
        length = acceptance.acceptance_length or 0.0
        rates = [round(rate, 3) for rate in acceptance.per_position_rates if rate is not None]
        self.state.history.append({"step": self.state.step, "acceptance_length": length, "per_position_rates": rates})
        logger.info("step %d: held-out acceptance length %.3f, by position %s", self.state.step, length, rates)
        if length > self.state.best_acceptance_length:
            self.state.best_acceptance_length, self.state.best_step = length, self.state.step
            self.best_weights = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}

    def _request_stop(self, signum: int, _frame: Any) -> None:
        logger.warning("%s: stopping after this step", signal.Signals(signum).name)
        self._stop = True

    def _save(self) -> None:
        save_checkpoint(
            self.work_dir,
            {
                "identity": self.identity,
                "state": dataclasses.asdict(self.state),
                "weights": self.head.state_dict(),
                "best_weights": self.best_weights,
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            },
        )

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.work_dir, self.identity, self.train_store.target.device)
        if checkpoint is None:
            return
        self.state = TrainState(**checkpoint["state"])
        self.head.load_state_dict(checkpoint["weights"])
        self.best_weights = checkpoint["best_weights"]
        self.average.load_state_dict(checkpoint["average"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["rng"].cpu())
        logger.info("resuming at step %d of %d", self.state.step, len(self.batches))
