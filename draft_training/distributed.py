"""The processes of one training run, on accelerate: which rows each computes, and how they agree.

A run of one process goes the same way; every exchange is then nothing. Methods said to be *collective* must be called
by all processes, in the same order.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from draft_training.heads import FeatureBatch
from draft_training.recipe import Objective
from draft_training.windows import Window
from specdec.device import Device, shards_weights

Item = TypeVar("Item")

# The others wait that long while the first process makes rows of traces or writes the head.
TIMEOUT = timedelta(hours=2)
LOST_PEER = re.compile(r"connection (closed|reset|refused)|timed out|NCCL|broken pipe", re.IGNORECASE)


def home_of(row: int, num_processes: int) -> int:
    """The process that computes and keeps the features of this row."""
    return row % num_processes


def share_out(rows: list[int], num_processes: int) -> list[list[int]]:
    """The rows of one step by process: none has more than an even share, rounded up, and rows
    stay at their home as far as that allows."""
    room = -(-len(rows) // num_processes)
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    away: list[int] = []
    for row in rows:
        home = shares[home_of(row, num_processes)]
        (home if len(home) < room else away).append(row)
    for row in away:
        min(shares, key=len).append(row)
    order = {row: i for i, row in enumerate(rows)}
    return [sorted(share, key=order.__getitem__) for share in shares]


def cut(share: list[Item], num_parts: int) -> list[list[Item]]:
    """``share`` in ``num_parts`` parts of about one length, in order; some are empty when it is short."""
    return [share[len(share) * k // num_parts : len(share) * (k + 1) // num_parts] for k in range(num_parts)]


class LossModule(nn.Module):
    """The head with its loss as ``forward``, where DDP and FSDP hook in; tensors outside of dataclasses, for FSDP."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, batch: FeatureBatch, objective: Objective) -> tuple[Tensor, list[int]]:
        """The loss, and how often each draft position's argmax was the target's."""
        output = self.head.compute_loss(batch, objective)
        return output.loss, output.num_correct


class Processes:
    """This process among those that train together.

    Raises:
        ValueError: the launcher wants something else than DDP or FSDP.
    """

    def __init__(self, parallel: str, device: Device) -> None:
        self._accelerator = Accelerator(
            cpu=device.kind == "cpu",
            mixed_precision="no",  # the trainer's own autocast decides
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=TIMEOUT),
            ],
        )
        known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
        if self._accelerator.distributed_type not in known:
            raise ValueError(f"heads train with DDP or FSDP, not with {self._accelerator.distributed_type.value}")
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.device = device
        self._sharded = shards_weights(parallel)
        self.wait()  # or a first process that fails at once leaves the others in the midst of this

    @property
    def is_first(self) -> bool:
        """The first process alone writes files."""
        return self.rank == 0

    def wrap(self, head: nn.Module) -> nn.Module:
        """The head's loss as a module whose gradients are averaged over the processes. Collective."""
        module = LossModule(head)
        if self.count == 1:
            return module
        if not self._sharded:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers; 2.9 has no other
                return self._accelerator.prepare_model(module)
        for parameter in module.parameters():
            torch.distributed.broadcast(parameter.detach(), 0)
        # One unit: heads call parts of their layers, which the hooks of smaller units would not see.
        return fully_shard(module)

    def own_rows(self, num_rows: int) -> range:
        """The rows that are at home here."""
        return range(self.rank, num_rows, self.count)

    def parts_of_share(self, windows: list[Window], accumulation_steps: int) -> list[list[Window]]:
        """This process's windows of a step (of a row it has one), in parts; the same number of parts in every process,
        some maybe empty."""
        num_parts = max(1, min(accumulation_steps, -(-len(windows) // self.count)))
        window_of = {window.row: window for window in windows}
        share = share_out(list(window_of), self.count)[self.rank]
        return cut([window_of[row] for row in share], num_parts)

    def accumulating(self, model: nn.Module, more_to_come: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a step's part: gradients are exchanged behind the last one."""
        if not more_to_come or self.count == 1:
            return nullcontext()
        return _without_exchange(model) if isinstance(model, FSDPModule) else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the losses' sum over the processes: the exchange averages, so each loss counts that often."""
        (loss * self.count if self.count > 1 else loss).backward()

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise over the processes. Collective."""
        return self._accelerator.reduce(values, "sum")

    def gather(self, item: Any) -> list[Any]:
        """Everybody's item, by rank. Collective."""
        return gather_object([item])

    def wait(self) -> None:
        """Until all are here. Collective."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def whole_weights(self, model: nn.Module) -> Iterator[None]:
        """The head may be called, read and exported by itself. Collective."""
        if isinstance(model, FSDPModule):
            model.unshard()
        yield
        if isinstance(model, FSDPModule):
            model.reshard()

    def end(self) -> None:
        """Leave the group. Collective."""
        self._accelerator.end_training()

    @contextmanager
    def losing_peers(self) -> Iterator[None]:
        """Ends in one line when another process is gone.

        Raises:
            ValueError: instead of what the broken exchange raises.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or isinstance(error, torch.OutOfMemoryError) or not LOST_PEER.search(str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"another process of this run is gone; what it said comes first ({reason})") from error


@contextmanager
def _without_exchange(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def whole(tree: Any) -> Any:
    """A tree of tensors with every shard gathered. Collective."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def laid_out_as(reference: Tensor, value: Tensor) -> Tensor:
    """``value`` on the device and in the shards of ``reference``. Collective."""
    if isinstance(reference, DTensor):
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value.to(reference.device)


def load_optimizer_state(optimizer: torch.optim.Optimizer, whole_state: dict[str, Any]) -> None:
    """Restore what ``whole(optimizer.state_dict())`` gave. Collective."""
    optimizer.load_state_dict(whole_state)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                state[name] = laid_out_as(parameter, value)


def rng_state() -> dict[str, Tensor]:
    """The generators' states of this process."""
    on_gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **on_gpu}


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restore what ``rng_state`` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
