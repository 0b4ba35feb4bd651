"""Clocks in the engine's process (``--scheduler-cls experiments.step_anatomy.scheduler.timed``)."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from experiments.step_anatomy.clocks import Clocks

clocks = Clocks("engine")
for owner, name, label in (
    (Scheduler, "schedule", "engine: schedule"),
    (Scheduler, "update_from_output", "engine: book the output"),
    (Scheduler, "update_draft_token_ids", "engine: take drafts"),
    (MultiprocExecutor, "sample_tokens", "engine: wait for sampling"),
    (MultiprocExecutor, "take_draft_token_ids", "engine: wait for drafts"),
    (EngineCore, "step", "engine: wait for the forward, and the rest"),
):
    clocks.wrap(owner, name, label)


class TimedScheduler(Scheduler):
    """Tells the clocks which step begins."""

    server = "spec"

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        clocks.process = f"engine-{self.server if self.num_spec_tokens else 'plain'}"
        clocks.begin(output)
        return output


class UncutScheduler(TimedScheduler):
    """Of the server without the cuts."""

    server = "uncut"


def timed(**kwargs: Any) -> Any:
    return TimedScheduler(**kwargs)


def uncut(**kwargs: Any) -> Any:
    return UncutScheduler(**kwargs)
