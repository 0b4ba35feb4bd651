"""The measurement: the same tasks through every arm, interleaved, in random order.

Block by block the arms take turns, so they never compete for the machine, and drift (heat, neighbours) hits all
alike. Each block of each arm is journalled with the server's own counters over it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from specdec.evaluation import acceptance, load
from specdec.evaluation.client import ArmClient
from specdec.evaluation.journal import Journal
from specdec.evaluation.plan import Step, Task
from specdec.evaluation.records import BlockRun, Cell, Measurement, Record, RequestResult

WARMUP_ROUNDS = 2
WARMUP_TOKENS = 32
OPEN_LOOP_WARMUP = 8  # requests at once
WAKING_TOKENS = 24
WARMUP_PROMPT = "Count from one to twenty, then say what the numbers have in common."
MAX_LAG_SEC = 0.05  # of an open loop: later than this, the client was the bottleneck
LAG_PERIOD_SEC = 0.1  # seldom enough to cost a busy machine nothing


async def measure(
    measurement: Measurement,
    steps: list[Step],
    clients: dict[str, ArmClient],
    journal: Journal,
    seed: int,
    advance: Callable[[int, str], None] = lambda count, what: None,
) -> None:
    """Fill ``measurement.runs``; ``advance`` is called with each block's number of requests.

    Ctrl-C (or SIGTERM) ends it early and keeps what was measured.

    Raises:
        ValueError: an arm fails its warm-up request, or one that speculates exports no acceptance counters.
    """
    session = _Session(clients, journal, seed, advance)
    measurement.interrupted = not await until_signal(session.run(steps))
    measurement.runs = [*journal.runs, *session.cut_short]
    measurement.notes += sorted({note for run in journal.runs for note in run.notes})


async def until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Do ``work``, which Ctrl-C (or SIGTERM) ends early; whether it came to its end."""
    task = asyncio.create_task(work)
    with _cancel_on_signals(task):
        try:
            await task
        except asyncio.CancelledError:
            return False
    return True


class _Session:
    def __init__(
        self, clients: dict[str, ArmClient], journal: Journal, seed: int, advance: Callable[[int, str], None]
    ) -> None:
        self.clients, self.journal, self.seed, self.advance = clients, journal, seed, advance
        self._waking: dict[str, str] = {}  # by arm, the task that it was asked last
        self.cut_short: list[BlockRun] = []  # measured in part when the run was interrupted; repeated on resume

    async def run(self, steps: list[Step]) -> None:
        await self._warm_up(max(map(_most_at_once, steps)))
        done = self.journal.done
        for step in steps:
            for arm in step.arms:
                count = sum(len(task.item.turns) for task in step.tasks)
                if (step.cell.name, step.repeat, step.block, arm) not in done:
                    self.journal.add(await self._block(step, self.clients[arm]))
                self.advance(count, f"{step.cell.name}, {step.suite}")

    async def _warm_up(self, concurrency: int) -> None:
        """Uncounted requests, as many at once as will be measured, so that every shape is compiled."""
        message = [{"role": "user", "content": WARMUP_PROMPT}]
        for client in self.clients.values():
            await self._check_counters(client)
            for _ in range(WARMUP_ROUNDS):
                requests = [client.chat(message, WARMUP_TOKENS, 0.0) for _ in range(concurrency)]
                results = await asyncio.gather(*requests)
                failed = next((result for result in results if result.error), None)
                if failed is not None:
                    raise ValueError(
                        f"the {client.arm.name} arm at {client.arm.url} failed its warm-up request: "
                        f"{failed.error} ({failed.error_detail})"
                    )
            await client.learn_template(results[0].prompt_token_ids)

    async def _check_counters(self, client: ArmClient) -> None:
        try:
            counts = acceptance.parse_acceptance(await client.metrics_text())
        except ValueError as error:
            if client.arm.num_speculative_tokens:
                raise ValueError(f"the {client.arm.name} arm should speculate, but: {error}") from error
            client.arm.num_speculative_tokens = 0
        else:
            served = client.arm.num_speculative_tokens
            client.arm.num_speculative_tokens = client.arm.asked_width(
                len(counts.num_accepted_per_pos) if served is None else served
            )

    async def _block(self, step: Step, client: ArmClient) -> BlockRun:
        cell = step.cell
        run = BlockRun(
            arm=client.arm.name, cell=cell.name, suite=step.suite, repeat=step.repeat, block=step.block,
            busy_sec=0.0, records=[],
        )  # fmt: skip
        # While the others had their turn its memory went cold: for up to 20 steps single ones take ten times as long.
        # No server that works knows that, so it is no part of the measurement. It is woken with a task that it had
        # before: a policy learns from it too, and from another kind of prompt would learn what the suite does not hold.
        waking = self._waking.get(client.arm.name, WARMUP_PROMPT)
        await client.chat([{"role": "user", "content": waking}], WAKING_TOKENS, 0.0)
        self._waking[client.arm.name] = step.tasks[-1].item.turns[0]
        before = await _page(client, run)
        times = load.offsets(cell.arrival, cell.rate, len(step.tasks), f"{self.seed}/{cell.name}/{step.block}")
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        watch = asyncio.create_task(_watch_lag(run))
        try:
            await (_closed_loop(step, client, run) if times is None else _open_loop(step, client, times, run))
        except asyncio.CancelledError:
            self.cut_short.append(run)
            raise
        finally:
            run.busy_sec = time.perf_counter() - wall_start
            run.client_cpu_sec = time.process_time() - cpu_start
            watch.cancel()
        _count(run, before, await _page(client, run))
        return run


def _most_at_once(step: Step) -> int:
    """Requests that may be in flight together; of an open loop a guess."""
    is_open = step.cell.arrival != load.CLOSED
    return min(len(step.tasks), OPEN_LOOP_WARMUP) if is_open else step.cell.concurrency


async def _watch_lag(run: BlockRun) -> None:
    """Sample how late this event loop wakes up: by as much may it notice a chunk too late."""
    while True:
        due = time.perf_counter() + LAG_PERIOD_SEC
        await asyncio.sleep(LAG_PERIOD_SEC)
        run.client_lags_sec.append(round(max(0.0, time.perf_counter() - due), 4))


async def _closed_loop(step: Step, client: ArmClient, run: BlockRun) -> None:
    gate = asyncio.Semaphore(step.cell.concurrency)

    async def one(task: Task) -> None:
        async with gate:
            await _converse(task, step, client, run)

    await asyncio.gather(*(one(task) for task in step.tasks))


async def _open_loop(step: Step, client: ArmClient, times: list[float], run: BlockRun) -> None:
    start = time.perf_counter()
    lags = []

    async def one(task: Task, offset: float) -> None:
        await asyncio.sleep(start + offset - time.perf_counter())
        lags.append(time.perf_counter() - start - offset)
        await _converse(task, step, client, run)

    await asyncio.gather(*(one(task, offset) for task, offset in zip(step.tasks, times, strict=True)))
    if max(lags) > MAX_LAG_SEC:
        run.notes.append(f"{step.cell.name}: the client sent requests over {1e3 * MAX_LAG_SEC:.0f} ms late")


async def _converse(task: Task, step: Step, client: ArmClient, run: BlockRun) -> None:
    """The turns of one task, each a record of ``run``. Answers are graded later, off the clock."""
    cell: Cell = step.cell
    messages: list[dict[str, str]] = []
    failed: str | None = None
    for turn, text in enumerate(task.item.turns):
        messages.append({"role": "user", "content": text})
        if failed is None:
            result = await client.chat(messages, cell.max_new_tokens, cell.temperature, cell.thinking_budget)
        else:  # it would be another conversation
            result = RequestResult(error="not_sent", error_detail=failed)
        run.records.append(
            Record(
                arm=client.arm.name, cell=cell.name, suite=step.suite, item_id=task.item.id, repeat=step.repeat,
                sample=task.sample, turn=turn, result=result,
            )
        )  # fmt: skip
        if result.error:
            failed = failed or f"turn {turn + 1} had failed: {result.error}"
        messages.append({"role": "assistant", "content": result.text})


async def _page(client: ArmClient, run: BlockRun) -> str | None:
    """The counters; a server that has died is noted, its requests are kept."""
    try:
        return await client.metrics_text()
    except ValueError as error:
        run.notes.append(f"no counters: {error}")
        return None


def _count(run: BlockRun, before: str | None, after: str | None) -> None:
    if before is None or after is None:
        return
    run.num_engine_steps = acceptance.engine_steps(before, after)
    try:
        counts, note = acceptance.window(acceptance.parse_acceptance(before), acceptance.parse_acceptance(after))
    except ValueError as error:
        if "restarted" in str(error):
            run.notes.append(f"{run.arm}: {error}")
        return
    run.acceptance = counts
    if note:
        run.notes.append(f"{run.arm}: {note}")


@contextlib.contextmanager
def _cancel_on_signals(task: asyncio.Task) -> Iterator[None]:
    """SIGINT and SIGTERM cancel ``task`` once; a second one acts as usual."""
    loop = asyncio.get_running_loop()
    installed: list[signal.Signals] = []

    def cancel() -> None:
        for each in installed:
            loop.remove_signal_handler(each)
        installed.clear()
        task.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread, not Unix
            loop.add_signal_handler(signal_number, cancel)
            installed.append(signal_number)
    try:
        yield
    finally:
        for each in installed:
            loop.remove_signal_handler(each)
