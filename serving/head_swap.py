"""The engine's side of a swap: another head drafts from one step to the next, and the old one returns if it was better.

The engine answers between two steps, so the workers' weights change between two steps. First every worker reads and
checks all of the new head; only when all of them have it is anything copied. Requests go on as they are: their outputs
never depend on the head.

**Keys and values that the old head left.** An EAGLE head attends to its own keys and values of a request's earlier
tokens. Those of requests that run at a swap stay the old head's: to make them again would mean to hold up everybody
for all their prompts and answers, and it only costs these requests some acceptance until they end. The prefix cache,
though, would hand them on to requests to come for as long as it is hit, so it is emptied; a prompt that it held is
prefilled once more. For the same reason the watch does not count the drafts of requests that were there before. Medusa
keeps nothing, so none of this applies.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving import head_weights
from serving.draft_rates import DraftRates
from serving.head_watch import WORSE, HeadWatch
from serving.scheduler import command, forget_cached_prefixes

logger = logging.getLogger("vllm.specdec")

STATUS = '{"command": "status"}'
WITHOUT_KEYS = ("medusa",)  # methods that keep no keys and values
UNWATCHED = "this server does not watch its acceptance (policy static): there is no way back by itself"


@dataclass(frozen=True, slots=True)
class Proven:
    """The head that comes back if its successor is worse."""

    facts: dict[str, Any]  # what a status says of it; empty: the launcher knows
    directory: str
    trained_rates: list[float]
    lately: DraftRates  # its drafts before the swap


class HeadSwap:
    """Which head drafts in an engine, and the way back to the one before."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.scheduler = engine, engine.scheduler
        self.facts: dict[str, Any] = {}  # of the running head; empty: it is the one that the server started with
        self.last: dict[str, Any] | None = None  # the last swap and what became of it
        self._proven: Proven | None = None  # while a successor is watched

    def status(self) -> dict[str, Any]:
        """What a status says of the head; without ``head`` and ``head_dir`` while the launcher's are right."""
        return {**self.facts, "swap": self.last}

    def swap(self, order: dict[str, Any]) -> None:
        """Let the head in ``order["head_dir"]`` draft from the next step on.

        ``order`` also holds ``head``, ``method``, ``conditional_rates`` as trained, ``layout``, and ``running``, the
        directory of the head that the server was started with.

        Raises:
            ValueError: why not; the head that was running goes on.
        """
        directory = str(order["head_dir"])
        parallel = self.engine.vllm_config.parallel_config
        if parallel.data_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError(
                "a server of several engines or pipeline stages swaps no heads: restart it with the new one"
            )
        self._tell_workers(head_weights.read, directory, order["layout"])
        control = getattr(self.scheduler, "specdec", None)
        try:
            self._tell_workers(head_weights.replace)
        except ValueError as error:
            self._return(control, f"{directory} was not copied: {error}")  # to one head in all workers
            raise
        earlier = self.facts.get("head_dir") or order["running"]
        keeps_keys = order["method"] not in WITHOUT_KEYS
        if keeps_keys:
            forget_cached_prefixes(self.scheduler)
        logger.info("specdec: head %s drafts in the place of %s", directory, earlier)
        self.last = {"from": earlier, "to": directory, "state": "unwatched", "reason": UNWATCHED}
        if control is None or control.policy is None:
            self._proven = None
            self._tell_workers(head_weights.settle)
        else:
            self._watch(control, earlier, order, set(self.scheduler.requests) if keeps_keys else set())
        self.facts = {"head": order["head"], "head_dir": directory}

    def _watch(self, control: Any, earlier: str, order: dict[str, Any], stale: set[str]) -> None:
        # While a successor is watched, the way back leads past it to the last head that was good.
        self._proven = self._proven or Proven(self.facts, earlier, control.trained_rates, control.lately)
        assert self.last is not None
        self.last |= {"from": self._proven.directory, "state": "watched", "reason": None}
        control.event("head", f"{order['head_dir']} drafts in the place of {earlier}")
        control.start_over(order["conditional_rates"])
        control.watch = HeadWatch(self._proven.lately, stale)
        control.on_verdict = lambda: self._decide(control)

    def _decide(self, control: Any) -> None:
        """The watch has a verdict."""
        watch, swap = control.watch, self.last
        assert swap is not None
        if watch.verdict == WORSE:
            self._return(control, watch.reason)
            return
        control.watch = self._proven = None
        self._tell_workers(head_weights.settle)
        swap |= {"state": "kept", "reason": watch.reason}
        what = f"{swap['to']} is kept: {watch.reason}"
        logger.info("specdec: head %s", what)
        control.event("head", what)

    def _return(self, control: Any, reason: str) -> None:
        """To the head before, where one is watched; else to what the workers copied last."""
        proven, self._proven = self._proven, None
        self._tell_workers(head_weights.take_back)
        forget_cached_prefixes(self.scheduler)
        if proven is None or self.last is None:
            return
        self.facts = proven.facts
        self.last |= {"state": "taken back", "reason": reason}
        what = f"{self.last['to']} is taken back for {proven.directory}: {reason}"
        logger.warning("specdec: head %s", what)
        if control is not None:
            control.watch = None
            control.start_over(proven.trained_rates, proven.lately)
            control.event("head", what)

    def _tell_workers(self, work: Callable[..., str | None], *args: Any) -> None:
        complaints = self.engine.model_executor.collective_rpc(work, args=args)
        for complaint in filter(None, complaints):
            raise ValueError(complaint)


def answer(engine: Any, request: str) -> str:
    """``EngineCore.specdec``: ``serving.scheduler.command``, ``{"command": "swap", ...}`` and ``{"command":
    "calibrated"}``; never raises."""
    try:
        if not hasattr(engine, "specdec_heads"):
            engine.specdec_heads = HeadSwap(engine)
        heads: HeadSwap = engine.specdec_heads
        asked = json.loads(request)
        if asked["command"] == "swap":
            heads.swap(asked)
            request = STATUS
        if asked["command"] == "calibrated":
            if (control := getattr(engine.scheduler, "specdec", None)) is not None:
                control.calibrated()
            request = STATUS
        return command(engine.scheduler, request, heads.status())
    except Exception as error:  # the engine must not fall over a question
        return json.dumps({"error": str(error)})
