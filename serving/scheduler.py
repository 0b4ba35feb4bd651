"""The policy inside vLLM's scheduler (``--scheduler-cls serving.scheduler.make_scheduler``).

The only file that touches vLLM's private names. vLLM 0.32 asks ``dynamic_sd_lookup[batch]`` for the number of tokens to
draft after each step; an object in its place asks the policy. Every hook is guarded: an exception leaves the number
that vLLM was started with, for good, and says so in the log; it never reaches the engine.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from serving.policy import Policy, parse_policy

logger = logging.getLogger("vllm.specdec")

POLICY_VARIABLE = "SPECDEC_POLICY"  # JSON: {"policy": "auto", "conditional_rates": [...]}
IDLE_SEC = 0.05  # a longer wait for the next step is an idle engine, and no part of the step
NEEDED = ("dynamic_sd_lookup", "num_spec_tokens", "make_spec_decoding_stats", "update_from_output", "schedule")
STATS_ARGUMENTS = ("spec_decoding_stats", "num_draft_tokens", "num_accepted_tokens")


class Control:
    """Feeds a policy from what a scheduler does, and answers for it."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.perf_counter) -> None:
        self.policy, self.clock = policy, clock
        self._ended_sec: float | None = None
        self._step: tuple[int, int] | None = None  # batch and K of a step that can be timed
        self._started_sec = 0.0
        self._logged: int | None = None

    def choose(self, batch: int) -> int:
        """K for the drafts that follow a step of ``batch`` sequences."""
        width = self.policy.choose(batch)
        if self.policy.chosen != self._logged:
            self._logged = self.policy.chosen
            logger.info("specdec: K=%d (%s)", self.policy.chosen, self.policy.reason)
        return width

    def scheduled(self, output: Any) -> None:
        """A step is about to run. It is timed when it only decodes, every sequence with the K that it drafts again."""
        self._started_sec = self.clock()
        drafts, tokens = output.scheduled_spec_decode_tokens, output.num_scheduled_tokens
        widths = {len(drafts.get(request_id, ())) for request_id in tokens}
        decodes = all(count == 1 + len(drafts.get(request_id, ())) for request_id, count in tokens.items())
        steady = not output.scheduled_new_reqs and widths == {output.num_spec_tokens_to_schedule}
        self._step = (len(tokens), output.num_spec_tokens_to_schedule) if tokens and decodes and steady else None

    def ended(self) -> None:
        """The step's tokens are booked."""
        now = self.clock()
        if self._step is not None:
            waited = self._ended_sec is None or self._started_sec - self._ended_sec > IDLE_SEC
            begin = self._started_sec if waited or self._ended_sec is None else self._ended_sec
            self.policy.observe_step(*self._step, now - begin)
        self._ended_sec, self._step = now, None


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """vLLM's own scheduler with the policy of ``SPECDEC_POLICY``; without speculation, or names, just vLLM's own."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    if vllm_config.speculative_config is None:
        return base(vllm_config=vllm_config, **kwargs)
    return controlled(base)(vllm_config=vllm_config, **kwargs)


def controlled(base: type) -> type:
    """``base`` with a guarded control."""

    class PolicyScheduler(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.specdec: Control | None = None
            missing = [name for name in NEEDED if not hasattr(self, name)]
            if missing:
                logger.error("specdec: this vLLM has no %s: the number of draft tokens stays fixed", ", ".join(missing))
                return
            with Guard(self):
                self.specdec = Control(_policy(self.num_spec_tokens))
                self.dynamic_sd_lookup = Lookup(self)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            if self.specdec is not None:
                with Guard(self):
                    self.specdec.scheduled(output)
            return output

        def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().update_from_output(*args, **kwargs)
            if self.specdec is not None:
                with Guard(self):
                    self.specdec.ended()
            return outputs

        def make_spec_decoding_stats(
            self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args, **kwargs
        ):
            if self.specdec is not None and num_draft_tokens:
                with Guard(self):
                    self.specdec.policy.observe_draft(num_draft_tokens, num_accepted_tokens)
            return super().make_spec_decoding_stats(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

    return PolicyScheduler


class Lookup:
    """What stands in the place of vLLM's table: an exception inside gives the fixed K."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getitem__(self, batch: int) -> int:
        with Guard(self.scheduler):
            return self.scheduler.specdec.choose(batch)
        return self.scheduler.num_spec_tokens


class Guard:
    """Turns the control off for good when its body raises."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        logger.error("specdec: the policy failed (%s: %s); K stays fixed", type(error).__name__, error, exc_info=error)
        self.scheduler.specdec, self.scheduler.dynamic_sd_lookup = None, None
        return True


def _policy(max_draft_tokens: int) -> Policy:
    settings = json.loads(os.environ.get(POLICY_VARIABLE) or "{}")
    policy = Policy(max_draft_tokens, settings.get("conditional_rates") or ())
    policy.mode, fixed = parse_policy(settings.get("policy") or "auto")
    policy.fixed = min(fixed, max_draft_tokens) if fixed is not None else max_draft_tokens
    return policy
