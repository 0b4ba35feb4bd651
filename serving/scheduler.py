"""The control inside vLLM's scheduler (``--scheduler-cls serving.scheduler.make_scheduler``).

The only file that touches its private names. vLLM 0.32 asks ``dynamic_sd_lookup[batch]`` for the number of
tokens to draft after each step; an object in its place asks the policy. Every hook is guarded: an exception leaves the
number that vLLM was started with, for good, and says so; it never reaches the engine.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.confidence import NAME as CONFIDENCE
from serving.control import Control
from serving.kept_policy import kept_policy
from serving.monitor import Monitor, SpanTracker
from serving.policy import Policy, parse_policy
from serving.policy_settings import ASYNCHRONOUS
from serving.traffic import TrafficLog

logger = logging.getLogger("vllm.specdec")

# JSON: {"policy": "auto", "conditional_rates": [...], "think_start": [ids], "think_end": [ids],
#        "traffic": {"directory": PATH, "share": 0.1, "max_bytes": N} or null}
POLICY_VARIABLE = "SPECDEC_POLICY"
NEEDED = (
    "dynamic_sd_lookup", "num_spec_tokens", "requests", "running", "add_request", "schedule", "update_from_output",
    "make_spec_decoding_stats", "update_draft_token_ids", "_update_after_schedule", "_free_request",
)  # fmt: skip


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """vLLM's own scheduler, synchronous or not as the engine is, with a control."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    is_async = vllm_config.scheduler_config.async_scheduling
    return controlled(AsyncScheduler if is_async else Scheduler, is_async)(vllm_config=vllm_config, **kwargs)


def controlled(base: type, is_async: bool = False) -> type:
    """``base`` with a guarded control. ``is_async``: it schedules a step while the one before it runs."""

    class PolicyScheduler(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.specdec: Control | None = None  # the one that is asked
            self.specdec_reports: Control | None = None  # the same, also after it failed
            self.specdec_failure: str | None = None
            missing = [name for name in NEEDED if not hasattr(self, name)]
            if missing:
                self.specdec_failure = f"this vLLM has no {', '.join(missing)}: K stays fixed"
                logger.error("specdec: %s", self.specdec_failure)
                return
            with Guard(self):
                self.specdec = self.specdec_reports = _control(self.num_spec_tokens, is_async)
                if self.specdec.policy is not None:
                    self.dynamic_sd_lookup = Lookup(self)

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            with Guard(self):
                if self.specdec is not None and request.sampling_params is not None:
                    self.specdec.added(request.request_id, request.sampling_params)
            return super().add_request(request, *args, **kwargs)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            with Guard(self):
                if self.specdec is not None:
                    self.specdec.scheduled(output)
            return output

        def _update_after_schedule(self, output: Any) -> None:
            super()._update_after_schedule(output)
            with Guard(self):  # asynchronous: placeholders for the drafts to come
                if self.specdec is not None:
                    self._shorten(self.specdec.limits(output.num_scheduled_tokens))

        def update_draft_token_ids(self, drafts: Any) -> None:
            super().update_draft_token_ids(drafts)
            with Guard(self):
                if self.specdec is not None:
                    self._shorten(self.specdec.cut(drafts.req_ids, getattr(drafts, CONFIDENCE, None)))

        def _shorten(self, limits: Mapping[str, int]) -> None:
            for request_id, limit in limits.items():
                request = self.requests.get(request_id)
                if request is not None and len(request.spec_token_ids) > limit:
                    request.spec_token_ids = request.spec_token_ids[:limit]  # the list may be shared

        def make_spec_decoding_stats(
            self, stats: Any, num_draft_tokens: int, num_accepted_tokens: int, num_invalid_spec_tokens: Any,
            request_id: str,
        ) -> Any:  # fmt: skip
            with Guard(self):
                if self.specdec is not None:
                    # Drafts that a grammar forbids were never verified.
                    num_drafted = num_draft_tokens - (num_invalid_spec_tokens or {}).get(request_id, 0)
                    if num_drafted > 0:
                        self.specdec.drafted(self.requests[request_id], num_drafted, num_accepted_tokens)
            return super().make_spec_decoding_stats(
                stats, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens, request_id
            )

        def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            with Guard(self):
                if self.specdec is not None:
                    self.specdec.finished(request)
            return super()._free_request(request, *args, **kwargs)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            with Guard(self):
                if self.specdec is not None:
                    num_tokens = sum(len(tokens) for tokens in model_runner_output.sampled_token_ids)
                    self.specdec.ended(num_tokens, self.requests.__contains__)
            return outputs

    return PolicyScheduler


class Lookup:
    """What stands in the place of vLLM's table: an exception inside gives the fixed K."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getitem__(self, batch: int) -> int:
        with Guard(self.scheduler):
            running = (request.request_id for request in self.scheduler.running)
            return self.scheduler.specdec.choose(batch, running)
        return self.scheduler.num_spec_tokens


class Guard:
    """Counts the time of its body, and turns the control off for good when it raises."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __enter__(self) -> None:
        self.begun_sec = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        scheduler = self.scheduler
        reports = scheduler.specdec_reports
        if reports is not None:
            reports.overhead_sec += time.perf_counter() - self.begun_sec
        if error is None or not isinstance(error, Exception):
            return False
        scheduler.specdec_failure = f"the policy failed ({type(error).__name__}: {error}); K stays fixed"
        logger.error("specdec: %s", scheduler.specdec_failure, exc_info=error)
        scheduler.specdec, scheduler.dynamic_sd_lookup = None, None
        if reports is not None:
            reports.failed(scheduler.specdec_failure)
        return True


def forget_cached_prefixes(scheduler: Any) -> None:
    """Empty the prefix cache, also under running requests: they keep their blocks, nobody else finds them."""
    try:
        manager = scheduler.kv_cache_manager
        manager.evict_blocks(set(range(len(manager.block_pool.blocks))))
    except Exception as error:  # it costs acceptance, no more
        logger.error("specdec: the prefix cache was not emptied (%s: %s)", type(error).__name__, error)


def command(scheduler: Any, request: str, facts: Mapping[str, Any] | None = None) -> str:
    """Answers ``{"command": "status"}`` (and ``facts``) or ``{"command": "policy", "policy": TEXT}``; never raises."""
    control: Control | None = getattr(scheduler, "specdec_reports", None)
    failure = getattr(scheduler, "specdec_failure", None)
    try:
        asked = json.loads(request)
        if asked["command"] == "policy":
            if control is None or failure:
                raise ValueError(failure or "this server runs without a policy: start it with --policy auto")
            control.set_policy(asked["policy"])
        width = getattr(scheduler, "num_spec_tokens", 0)
        mode = "safe" if failure else "fixed" if width else "plain"
        alone: dict[str, Any] = {"mode": mode, "num_speculative_tokens": width, "reason": failure}
        alone["totals"] = {"policy_failures": int(bool(failure))}
        return json.dumps({**(control.status(failure) if control is not None else alone), **(facts or {})})
    except Exception as error:  # the engine must not fall over a question
        return json.dumps({"error": str(error)})


def _control(num_spec_tokens: int, is_async: bool) -> Control:
    settings = json.loads(os.environ.get(POLICY_VARIABLE) or "{}")
    rates = [rate for rate in settings.get("conditional_rates") or () if rate is not None]
    policy = Policy(num_spec_tokens, rates, ASYNCHRONOUS if is_async else None) if num_spec_tokens else None
    if policy is not None:
        policy.set_mode(*parse_policy(kept_policy() or settings.get("policy") or "auto"))
    spans = SpanTracker(settings.get("think_start") or (), settings.get("think_end") or ())
    log = TrafficLog(Path(to["directory"]), to["share"], to["max_bytes"]) if (to := settings.get("traffic")) else None
    return Control(policy, Monitor(num_spec_tokens, rates), spans, rates, log, settings.get("times"))
