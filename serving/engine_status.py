"""The engine's status and policy as the HTTP side sees them: asked for through vLLM's own client, with an end."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.specdec")

FACTS_VARIABLE = "SPECDEC_STATUS"  # JSON object: what the launcher knows and the engine may not (head, target, reason)
ANSWER_TIMEOUT_SEC = 5.0
SWAP_TIMEOUT_SEC = 300.0  # the workers read a head's file
UTILITY = "specdec"  # the engine core's method
# What every status has, be it null: a server whose K is vLLM's own knows few of them.
KEYS = (
    "mode", "policy", "num_speculative_tokens", "acceptance_length", "per_position_rates", "conditional_rates",
    "goodput_tok_per_sec", "fallback_share", "alarm", "reason", "head", "head_dir", "swap", "target",
    "uptime_sec",
)  # fmt: skip


class EngineUnavailableError(Exception):
    """The engine gave no answer; the text says why."""


class BadPolicyError(ValueError):
    """The engine refused the policy; the text is its own."""


class SwapRefusedError(Exception):
    """The engine goes on with the head that it has; the text says why."""


REFUSALS = {"policy": BadPolicyError, "swap": SwapRefusedError}


def read_facts(text: str | None) -> dict[str, Any]:
    """The launcher's facts; nothing, and a line in the log, when they are not a JSON object."""
    try:
        facts = json.loads(text or "{}")
        if not isinstance(facts, dict):
            raise ValueError(f"a {type(facts).__name__} instead of an object")
        return facts
    except ValueError as error:
        logger.error("specdec: %s is ignored: %s", FACTS_VARIABLE, error)
        return {}


class EngineStatus:
    """Asks the engine core; callers that come while a question is open share its answer.

    So a slow engine collects one question, not one of each viewer and second. A question is never cancelled:
    its answer still counts when it comes late.
    """

    def __init__(
        self,
        engine_client: Any,
        facts: dict[str, Any],
        timeout_sec: float = ANSWER_TIMEOUT_SEC,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine_client, self.facts, self.timeout_sec, self.clock = engine_client, facts, timeout_sec, clock
        self.latest: dict[str, Any] | None = None
        self._latest_sec, self._started_sec = 0.0, clock()
        self._open: asyncio.Task[dict[str, Any]] | None = None

    @property
    def age_sec(self) -> float:
        """Since the latest status came; infinite before the first."""
        return self.clock() - self._latest_sec if self.latest is not None else float("inf")

    async def status(self, max_age_sec: float = 0.0, timeout_sec: float | None = None) -> dict[str, Any]:
        """The engine's status, the launcher's facts in the place of its nulls.

        Raises:
            EngineUnavailableError: no answer within ``timeout_sec`` (default: the constructor's), or no sensible one.
        """
        if self.latest is not None and self.age_sec <= max_age_sec:
            return self.latest
        if self._open is None or self._open.done():
            self._open = self._start({"command": "status"})
        return await self._answer(self._open, timeout_sec)

    async def set_policy(self, policy: str) -> dict[str, Any]:
        """Set the policy; gives the status after it.

        Raises:
            BadPolicyError: the engine refuses it.
            EngineUnavailableError: as in ``status``.
        """
        return await self._answer(self._start({"command": "policy", "policy": policy}))

    async def calibrated(self) -> dict[str, Any]:
        """Forget what was accepted so far (``serving.calibration``); gives the status after it.

        Raises:
            EngineUnavailableError: as in ``status``.
        """
        return await self._answer(self._start({"command": "calibrated"}))

    async def swap_head(self, order: dict[str, Any]) -> dict[str, Any]:
        """Let another head draft (``serving.head_swap``); gives the status after it.

        Raises:
            SwapRefusedError: the engine keeps its head.
            EngineUnavailableError: as in ``status``; the swap may still happen.
        """
        return await self._answer(self._start({"command": "swap", **order}), SWAP_TIMEOUT_SEC)

    def _start(self, command: dict[str, Any]) -> asyncio.Task[dict[str, Any]]:
        task = asyncio.get_running_loop().create_task(self._ask(command))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also when nobody waits
        return task

    async def _answer(self, task: asyncio.Task[dict[str, Any]], timeout_sec: float | None = None) -> dict[str, Any]:
        timeout_sec = self.timeout_sec if timeout_sec is None else timeout_sec
        try:
            return await asyncio.wait_for(asyncio.shield(task), timeout_sec)
        except TimeoutError:
            raise EngineUnavailableError(f"the engine did not answer within {timeout_sec:g} s") from None

    async def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        if self.engine_client.errored:
            raise EngineUnavailableError("the engine is dead")
        try:
            text = await self.engine_client.engine_core.call_utility_async(UTILITY, json.dumps(command))
            answer = json.loads(text, parse_constant=lambda name: None)  # NaN is nothing known either
        except Exception as error:
            # vLLM has many ways to say that its engine is gone; none may reach a client as a traceback.
            raise EngineUnavailableError(f"the engine could not answer ({type(error).__name__}: {error})") from error
        if not isinstance(answer, dict):
            raise EngineUnavailableError(f"the engine answered {text[:100]!r} instead of a status")
        if "error" in answer:
            raise REFUSALS.get(command["command"], EngineUnavailableError)(str(answer["error"]))
        answer = {**dict.fromkeys(KEYS), "uptime_sec": self.clock() - self._started_sec, **answer}
        self.latest = answer | {name: fact for name, fact in self.facts.items() if answer.get(name) is None}
        self._latest_sec = self.clock()
        return self.latest
