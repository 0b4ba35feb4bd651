"""A scheduler whose policy drafts all the head can, and takes every row of a step for dear (``--scheduler-cls``)."""

from __future__ import annotations

from typing import Any

from serving.policy import Policy
from serving.scheduler import make_scheduler

PRICE = 0.8  # of a draft token, in plain steps


def dear(vllm_config: Any, **kwargs: Any) -> Any:
    scheduler = make_scheduler(vllm_config, **kwargs)

    class AllDrafts(Policy):
        def choose(self, batch: int, sampled: bool = False, is_calibration: bool = False) -> int:
            return self.max_draft_tokens

    scheduler.specdec.policy = AllDrafts(scheduler.num_spec_tokens)
    scheduler.specdec.policy.cut.prices = {2**i: PRICE for i in range(8)}
    return scheduler
