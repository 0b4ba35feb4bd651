"""The one training loop. It knows the head protocol and no architecture's name."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from draft_training.averaging import WeightAverage
from draft_training.checkpoint import load_checkpoint, save_checkpoint
from draft_training.collate import strip_tokens, strips
from draft_training.distributed import (
    Processes,
    laid_out_as,
    load_optimizer_state,
    rng_state,
    set_rng_state,
    whole,
)
from draft_training.features import FeatureStore, length_groups
from draft_training.interrupt import Interrupted
from draft_training.optimizers import make_optimizer
from draft_training.recipe import Objective, settled
from draft_training.recompute import recompute_activations
from draft_training.selection import HeldOutAcceptance, held_out_acceptance
from draft_training.step import GradientMaker, StepFigures
from draft_training.train_log import TrainLog
from draft_training.windows import Tiles, Window, coverage, draw, plan_windows
from specdec.config import TrainConfig
from specdec.metrics import AcceptanceCounts
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
    batches: list[list[Window]] = []
    for epoch in range(math.ceil(config.epochs)):
        rng = random.Random(f"{config.seed}/{epoch}")
        order = draw(planned, config.seed, epoch)
        rng.shuffle(order)
        # Sorting whole pools by length keeps padding low without ordering the epoch by length.
        num_tokens = strip_tokens(order)
        num_pools = max(1, num_tokens // (POOL_BATCHES * config.batch_tokens))
        laid = strips(order, config.pack_tokens)
        size = math.ceil(len(laid) / num_pools)
        pools = [sorted(laid[i : i + size], key=strip_tokens) for i in range(0, len(laid), size)]
        groups = [group for members in pools for group in length_groups(members, strip_tokens, config.batch_tokens)]
        rng.shuffle(groups)
        kept = groups[: math.ceil(min(1.0, config.epochs - epoch) * len(groups))]
        batches += [list(itertools.chain(*group)) for group in kept]
    return batches


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then linear to zero: a cosine came out 0.013 of acceptance length lower."""
    warmup = max(1, round(warmup_fraction * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (step - warmup) / max(1, num_steps - warmup)


class Trainer:
    """Trains ``head`` on ``train_store``, picks the checkpoint by acceptance on ``val_store``.

    A step's batch is the same however many processes and parts share it, so they change a run's speed and memory but,
    up to rounding, not its weights. Each process measures its own rows of ``val_store``.
    """

    def __init__(
        self,
        head: Any,
        train_store: FeatureStore,
        val_store: FeatureStore,
        config: TrainConfig,
        precision: str,
        on_policy: bool,
        work_dir: Path,
        identity: dict[str, Any],
        processes: Processes,
        measure_start: bool = False,
    ) -> None:
        """``measure_start``: the weights to start from are a candidate for the best."""
        config = settled(config, processes.device)
        if config.checkpoint_activations and not recompute_activations(head):
            logger.warning("train.checkpoint_activations: this head has no layer that it would help")
        self.measure_start = measure_start
        self.head, self.train_store, self.val_store, self.processes = head, train_store, val_store, processes
        self.config, self.on_policy, self.work_dir, self.identity = config, on_policy, work_dir, identity
        planned = plan_windows(train_store.rows, config, head.num_speculative_tokens)
        self.batches = plan_batches(planned, config)
        self.coverage = coverage(planned, self.batches)
        recipe = config.learning_rate, config.lm_head_lr_scale, config.weight_decay
        head.parameter_groups(*recipe)  # freezes what is to be frozen: DDP and FSDP look once
        self.model = processes.wrap(head)
        self.optimizer = make_optimizer(config.optimizer, head.parameter_groups(*recipe))
        self.average = WeightAverage(head, config.ema)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.state = TrainState()
        self.best_weights: dict[str, torch.Tensor] = {}
        device_type = train_store.target.device.type
        self.gradients = GradientMaker(
            head=head,
            model=self.model,
            store=train_store,
            processes=processes,
            # Masters stay float32; autocast only narrows the matrix products.
            autocast=lambda: torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"),
            objective=Objective.of(config),
            accumulation_steps=config.accumulation_steps,
            pack_tokens=config.pack_tokens,
        )
        self._stop = False
        self._saved_at_step, self._saved_at_sec = -1, time.monotonic()

    @property
    def eval_steps(self) -> set[int]:
        """Steps after which the held-out acceptance is measured; the last one always."""
        total = len(self.batches)
        return {round(total * (i + 1) / self.config.num_evals) for i in range(self.config.num_evals)} | {total}

    def run(self) -> None:
        """Train to the end (resuming where an earlier run stopped); leaves the best weights in ``head``. Collective.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM of any process, after the checkpoint is written.
            ValueError: loss or gradient are no longer finite; the last checkpoint is kept.
        """
        self._resume()
        log = TrainLog(self.work_dir, self.state.step, self.config.tensorboard) if self.processes.is_first else None
        previous = {sig: signal.signal(sig, self._request_stop) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop(log)
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
            if log is not None:
                log.close()
        self.head.load_state_dict(self.best_weights)

    def _loop(self, log: TrainLog | None) -> None:
        total, state, eval_steps = len(self.batches), self.state, self.eval_steps
        if self.measure_start and state.step == 0:
            self._evaluate()
        with progress_bar("training", total) as advance:
            advance(state.step)
            while state.step < total:
                started = time.monotonic()
                figures = self._train_step(self.batches[state.step])
                step_sec = time.monotonic() - started
                state.step += 1
                state.num_tokens += figures.num_tokens
                state.train_sec += step_sec
                hits = "/".join(f"{rate:.2f}" for rate in figures.top1_rates)
                speed = f"{state.num_tokens / state.train_sec:.0f} tok/s"
                advance(1, f"loss {figures.loss:.3f} top-1 {hits} {speed}")
                acceptance_length = self._evaluate() if state.step in eval_steps else None
                if log is not None:
                    log.write(
                        state.step,
                        loss=figures.loss,
                        top1_rates=figures.top1_rates,
                        learning_rate=self.optimizer.param_groups[0]["lr"],
                        tok_per_sec=figures.num_tokens / step_sec,
                        acceptance_length=acceptance_length,
                    )
                stop, save = figures.wishes
                if stop or save or state.step == total:
                    self._save()
                if stop and state.step < total:
                    raise Interrupted

    def _train_step(self, windows: list[Window]) -> StepFigures:
        factor = learning_rate_factor(self.state.step, len(self.batches), self.config.warmup_fraction)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        figures = self.gradients.run(windows, wishes=lambda: [self._stop, self._save_is_due()])
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip_norm)
        self._check_finite(figures.loss, float(whole(norm)), windows)
        self.optimizer.step()
        self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _check_finite(self, loss: float, grad_norm: float, windows: list[Window]) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {grad_norm}"
        names = [self.train_store.rows[window.row].conversation_id for window in windows]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        kept = f"the checkpoint of step {self._saved_at_step} is kept" if self._saved_at_step >= 0 else "none was saved"
        raise ValueError(
            f"{what} at step {self.state.step + 1} (rows {shown}); {kept} in {self.work_dir}: lower "
            "train.learning_rate and start again with another --out"
        )

    def _evaluate(self) -> float:
        with self.average.applied():
            return self._compare(self.measure().total)

    def measure(self) -> HeldOutAcceptance:
        """The acceptance of the head as it is on all held-out rows. Collective."""
        rows = self.processes.own_rows(len(self.val_store.rows))
        with self.processes.whole_weights(self.model):
            own = held_out_acceptance(self.head, self.val_store, self.on_policy, self.config.batch_tokens, rows)
        return HeldOutAcceptance.merged(self.processes.gather(own))

    def _compare(self, acceptance: AcceptanceCounts) -> float:
        """Note the acceptance length, and keep the weights if they are the best so far."""
        length = acceptance.acceptance_length or 0.0
        rates = [round(rate, 3) for rate in acceptance.per_position_rates if rate is not None]
        self.state.history.append({"step": self.state.step, "acceptance_length": length, "per_position_rates": rates})
        logger.info("step %d: held-out acceptance length %.3f, by position %s", self.state.step, length, rates)
        if length > self.state.best_acceptance_length:
            self.state.best_acceptance_length, self.state.best_step = length, self.state.step
            self.best_weights = {name: tensor.clone() for name, tensor in self.head.state_dict().items()}
        return length

    def _request_stop(self, signum: int, _frame: Any) -> None:
        if not self._stop:
            logger.warning("%s: stopping after this step", signal.Signals(signum).name)
        self._stop = True

    def _save_is_due(self) -> bool:
        """The first process's clock decides for all."""
        waited_sec = time.monotonic() - self._saved_at_sec
        return self.processes.is_first and waited_sec > self.config.checkpoint_every_sec

    def _save(self) -> None:
        tree = {
            "identity": self.identity,
            "state": dataclasses.asdict(self.state),
            "weights": whole(self.head.state_dict()),
            "best_weights": whole(self.best_weights),
            "average": whole(self.average.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "rng": self.processes.gather(rng_state()),
        }
        if self.processes.is_first:
            save_checkpoint(self.work_dir, tree)
        self.processes.wait()  # whoever ends now ends all, and would cut the file short
        self._saved_at_step, self._saved_at_sec = self.state.step, time.monotonic()

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.work_dir, self.identity)
        if len(set(self.processes.gather(checkpoint and checkpoint["state"]["step"]))) > 1:
            raise ValueError(f"the processes see different files in {self.work_dir}: --out must be on a shared disk")
        if checkpoint is None:
            return
        self.state = TrainState(**checkpoint["state"])
        self._saved_at_step = self.state.step
        layout = self.head.state_dict()

        def laid_out(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: laid_out_as(layout[name], tensor) for name, tensor in weights.items()}

        self.best_weights = laid_out(checkpoint["best_weights"])
        self.head.load_state_dict(laid_out(checkpoint["weights"]))
        average = checkpoint["average"]
        self.average.load_state_dict({**average, "averages": laid_out(average["averages"])})
        load_optimizer_state(self.optimizer, checkpoint["optimizer"])
        set_rng_state(checkpoint["rng"][self.processes.rank % len(checkpoint["rng"])])
        logger.info("resuming at step %d of %d", self.state.step, len(self.batches))
