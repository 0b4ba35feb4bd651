"""Servers that share a machine in short slices, so that its moods meet all of them alike.

A machine that others share may run at two thirds of its speed for some seconds. Arms that are measured one after the
other then differ by that much. Here every server has its requests in flight, but the engine of one alone runs: vLLM
freezes the others between two steps (``/pause?mode=keep``). The one that has the fewest tokens so far goes next. So all
do the same part of the same work at nearly the same time, and only the time of its own slices counts for each. The
processes of the others are stopped as well: an engine that has just been paused polls its queues for some seconds.

What counts ends with the slice in which an arm's last request began: from then on fewer are answered at a time than the
load has, and which arm's last answer happens to be a long one would decide.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from specdec.evaluation.arms import Arm, auth_headers
from specdec.evaluation.client import ArmClient

SLICE_SEC = 0.2
# vLLM waits so long after the engine stands still before it answers a pause.
PAUSE_SLEEP_SEC = 0.02
TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{.*\})?\s+(\S+)", re.MULTILINE)

DEV_MODE = "VLLM_SERVER_DEV_MODE"  # a server's environment must hold it as 1: it brings /pause and /resume


class Request(NamedTuple):
    prompt: str
    max_tokens: int
    seed: int | None = None


@dataclass(slots=True)
class Work:
    """What one arm did while requests waited: tokens and seconds after each of its slices, from the first on."""

    num_tokens: list[int] = field(default_factory=lambda: [0])
    seconds: list[float] = field(default_factory=lambda: [0.0])
    before: dict[str, Any] = field(default_factory=dict)  # the server's own figures
    after: dict[str, Any] = field(default_factory=dict)


class SlicedArm:
    """One server's clients, and the switch of its engine."""

    def __init__(self, arm: Arm) -> None:
        import httpx

        self.name, self.client, self.work = arm.name, ArmClient(arm), Work()
        self.num_waiting = 0  # requests of its load that have not begun
        self.num_tokens = 0  # output tokens since the server's start,
        self.figures: dict[str, Any] = {}  # and its own figures, when it was frozen last
        self._http = httpx.AsyncClient(base_url=arm.url, headers=auth_headers(), timeout=60, trust_env=False)
        self._processes, self.is_frozen = engine_processes(arm.url), False

    async def close(self) -> None:
        """Let the engine run on, without us."""
        await self._thaw()
        await self._http.aclose()
        await self.client.__aexit__()

    async def _thaw(self) -> None:
        for process in self._processes:
            process.resume()
        self.is_frozen = False
        (await self._http.post("/resume")).raise_for_status()

    async def freeze(self) -> float:
        """When its last step ended."""
        (await self._http.post("/pause", params={"mode": "keep", "clear_cache": "false"})).raise_for_status()
        ended = time.perf_counter() - PAUSE_SLEEP_SEC
        self.num_tokens, self.figures = await self._num_tokens(), await self._figures()
        for process in self._processes:
            process.suspend()
        self.is_frozen = True
        return ended

    async def _figures(self) -> dict[str, Any]:
        """How many steps had which K, and totals; of a plain server little."""
        status = (await self._http.get("/specdec/status")).raise_for_status().json()
        return {key: status.get(key) or {} for key in ("k_histogram", "totals")}

    async def _num_tokens(self) -> int:
        """Output tokens since the server's start."""
        page = (await self._http.get("/metrics")).raise_for_status().text
        return int(sum(float(value) for value in TOKENS.findall(page)))

    def begin(self, requests: Sequence[Request], concurrency: int, temperature: float) -> asyncio.Task[None]:
        """A closed loop; the task raises an ``ExceptionGroup`` when a request failed."""
        self.num_waiting = len(requests)
        return asyncio.create_task(self._answer(requests, asyncio.Semaphore(concurrency), temperature))

    async def _answer(self, requests: Sequence[Request], gate: asyncio.Semaphore, temperature: float) -> None:
        async def one(request: Request) -> None:
            async with gate:
                self.num_waiting -= 1
                messages = [{"role": "user", "content": request.prompt}]
                result = await self.client.chat(messages, request.max_tokens, temperature, seed=request.seed)
                if result.error:
                    raise RuntimeError(f"{self.name}: {result.error}: {result.error_detail}")

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(one(request))

    async def warm_up(self, task: asyncio.Task[None], seconds: float) -> None:
        """Run ``task``, its load, alone for a while; what is not answered by then is dropped. It is frozen again
        afterwards."""
        await self._thaw()
        await asyncio.wait({task}, timeout=seconds)
        await _ended(task)
        while await self._running():
            await asyncio.sleep(0.05)
        await self.freeze()

    async def _running(self) -> bool:
        page = (await self._http.get("/metrics")).raise_for_status().text
        return any(float(n) for n in re.findall(r"^vllm:num_requests_running\{.*\}\s+(\S+)", page, re.MULTILINE))

    async def run_slice(self, task: asyncio.Task[None], base_tokens: int) -> None:
        """A slice of its own, or less when ``task``, its load, comes to its end."""
        await self._thaw()
        begun = time.perf_counter()
        await asyncio.wait({task}, timeout=SLICE_SEC)
        answered = time.perf_counter()
        was_last = task.done()
        ended = await self.freeze()
        self.work.seconds.append(self.work.seconds[-1] + (answered if was_last else ended) - begun)
        self.work.num_tokens.append(self.num_tokens - base_tokens)

    async def finish(self, task: asyncio.Task[None]) -> None:
        """Answer the rest of ``task``, its load. It is frozen again afterwards."""
        await self._thaw()
        await task
        await self.freeze()


async def measure(
    arms: Sequence[SlicedArm],
    requests: Sequence[Request],
    warm_up: Sequence[Request],
    concurrency: int,
    temperature: float,
    warm_up_sec: float,
    advance: Callable[[int], None],
) -> dict[str, Work]:
    """``requests`` on each arm, in slices until the last one begins; ``advance`` is told of tokens. ``warm_up`` may be
    empty.

    Raises:
        ExceptionGroup: a request failed.
    """
    tasks: dict[SlicedArm, asyncio.Task[None]] = {}
    try:
        for arm in arms:
            if not arm.is_frozen:
                await arm.freeze()
        for arm in arms if warm_up else ():
            await arm.warm_up(arm.begin(warm_up, concurrency, temperature), warm_up_sec)
        base = {arm: arm.num_tokens for arm in arms}
        for arm in arms:
            arm.work = Work(before=arm.figures)
            tasks[arm] = arm.begin(requests, concurrency, temperature)
        while waiting := [arm for arm in arms if arm.num_waiting and not tasks[arm].done()]:
            arm = min(waiting, key=lambda arm: arm.work.num_tokens[-1])
            before = arm.work.num_tokens[-1]
            await arm.run_slice(tasks[arm], base[arm])
            advance(arm.work.num_tokens[-1] - before)
        for arm in arms:
            arm.work.after = arm.figures
            await arm.finish(tasks[arm])
    finally:
        for task in tasks.values():
            await _ended(task)
    return {arm.name: arm.work for arm in arms}


def engine_processes(url: str) -> list[Any]:
    """What runs below the server at ``url`` of this machine: its engine and workers."""
    import psutil

    port = int(url.rpartition(":")[2])
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    owner = next(each.pid for each in listening if each.laddr.port == port)
    return psutil.Process(owner).children(recursive=True)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel what still runs; a failure shows."""
    if not task.done():
        task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
