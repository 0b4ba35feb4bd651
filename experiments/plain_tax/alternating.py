"""A scheduler that falls back and comes back by the clock (``--scheduler-cls``)."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from serving.policy import Policy
from serving.scheduler import make_scheduler

PLAIN_STEPS, DRAFTING_STEPS = 40, 24


def alternating(vllm_config: Any, **kwargs: Any) -> Any:
    """K = 0 for 40 steps, then the head's K for 24, and so on."""
    scheduler = make_scheduler(vllm_config, **kwargs)
    widths = cycle([0] * PLAIN_STEPS + [scheduler.num_spec_tokens] * DRAFTING_STEPS)

    class ByTheClock(Policy):
        def choose(self, batch: int, sampled: bool = False, is_calibration: bool = False) -> int:
            return next(widths)

        def threshold(self, batch: int) -> float | None:
            return None  # every draft is verified: what is accepted is to be compared

    scheduler.specdec.policy = ByTheClock(scheduler.num_spec_tokens)
    return scheduler
