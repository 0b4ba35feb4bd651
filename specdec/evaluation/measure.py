"""The measurement: the same prompts through both arms, interleaved, in random order.

Between blocks of ``concurrency`` prompts the arms take turns, so they never compete for the machine and
drift (heat, neighbours) hits both alike. Which arm goes first is a seeded coin; the next repeat reverses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from specdec.config import EvalConfig
from specdec.evaluation import acceptance
from specdec.evaluation.arms import PLAIN, SPEC, Arm
from specdec.evaluation.client import ArmClient, RequestResult
from specdec.metrics import AcceptanceCounts

GREEDY = "greedy"
SAMPLED = "sampled"
WARMUP_ROUNDS = 2
WARMUP_TOKENS = 32
WARMUP_PROMPT = "Count from one to twenty, then say what the numbers have in common."


@dataclass(kw_only=True, slots=True)
class Record:
    """One counted request."""

    mode: str
    repeat: int
    prompt_index: int
    arm: str
    result: RequestResult


@dataclass(kw_only=True, slots=True)
class ModeRun:
    """All that one decoding mode gave."""

    name: str
    temperature: float | None  # None: the server's default sampling
    records: list[Record] = field(default_factory=list)
    busy_sec: dict[str, float] = field(default_factory=lambda: {PLAIN: 0.0, SPEC: 0.0})
    acceptance: AcceptanceCounts | None = None


@dataclass(kw_only=True, slots=True)
class Measurement:
    """All that the run gave; ``interrupted`` means that Ctrl-C cut it short."""

    prompts: list[str]
    modes: dict[str, ModeRun] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    num_speculative_tokens: int | None = None  # K, as the counters of the speculative arm show it
    client_cpu_share: float | None = None  # of one core, while measuring: near 1 the client is the bottleneck


def num_requests(config: EvalConfig, num_prompts: int) -> int:
    """How many requests ``measure`` counts."""
    return num_prompts * 2 * (config.repeats + (1 if config.sampled else 0))


def measure(
    config: EvalConfig, arms: dict[str, Arm], prompts: list[str], advance: Callable[[str], None] = lambda mode: None
) -> Measurement:
    """Measure ``prompts`` on both arms; ``advance`` is called after each counted request.

    Ctrl-C (or SIGTERM) ends it early and keeps what was measured.

    Raises:
        ValueError: an arm fails its warm-up request, or the speculative arm exports no acceptance counters.
    """
    if config.repeats < 1 or config.concurrency < 1:
        raise ValueError("eval.repeats and eval.concurrency must be at least 1")
    return asyncio.run(_Session(config, prompts, advance).run(arms))


class _Session:
    def __init__(self, config: EvalConfig, prompts: list[str], advance: Callable[[str], None]) -> None:
        self.config = config
        self.advance = advance
        self.measurement = Measurement(prompts=prompts)
        self.counters_required = True

    async def run(self, arms: dict[str, Arm]) -> Measurement:
        same_server = arms[PLAIN].url == arms[SPEC].url
        self.counters_required = not same_server
        if same_server:
            self._note("both arms are one server (an A/A run): acceptance counts the requests of both")
        async with ArmClient(arms[PLAIN]) as plain, ArmClient(arms[SPEC]) as spec:
            task = asyncio.create_task(self._all_modes({PLAIN: plain, SPEC: spec}))
            with _cancel_on_signals(task):
                try:
                    await task
                except asyncio.CancelledError:
                    self.measurement.interrupted = True
        return self.measurement

    async def _all_modes(self, clients: dict[str, ArmClient]) -> None:
        await self._warm_up(clients)
        modes = [ModeRun(name=GREEDY, temperature=0.0)]
        if self.config.sampled:
            modes.append(ModeRun(name=SAMPLED, temperature=None))
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        try:
            for mode in modes:
                self.measurement.modes[mode.name] = mode
                before = await self._counters(clients[SPEC])
                try:
                    await self._one_mode(mode, clients)
                finally:
                    await self._close_mode(mode, before, clients[SPEC])
        finally:
            wall = time.perf_counter() - wall_start
            self.measurement.client_cpu_share = (time.process_time() - cpu_start) / wall if wall > 0 else None

    async def _warm_up(self, clients: dict[str, ArmClient]) -> None:
        """Uncounted requests, as many at once as will be measured, so that every shape is compiled."""
        max_tokens = min(WARMUP_TOKENS, self.config.max_new_tokens)
        for client in clients.values():
            for _ in range(WARMUP_ROUNDS):
                results = await asyncio.gather(
                    *(client.chat(WARMUP_PROMPT, max_tokens, 0.0) for _ in range(self.config.concurrency))
                )
                failed = next((result for result in results if result.error), None)
                if failed is not None:
                    raise ValueError(
                        f"the {client.arm.name} arm at {client.arm.url} failed its warm-up request: "
                        f"{failed.error} ({failed.error_detail})"
                    )

    async def _one_mode(self, mode: ModeRun, clients: dict[str, ArmClient]) -> None:
        indices = list(range(len(self.measurement.prompts)))
        blocks = [indices[i : i + self.config.concurrency] for i in range(0, len(indices), self.config.concurrency)]
        seed = f"{self.config.seed}/{mode.name}"
        # Sampled outputs differ in length and content between repeats: more prompts tell more than more repeats.
        repeats = self.config.repeats if mode.name == GREEDY else 1
        for repeat, number, order in schedule(len(blocks), repeats, seed):
            for arm in order:
                await self._block(mode, repeat, blocks[number], clients[arm])

    async def _block(self, mode: ModeRun, repeat: int, block: list[int], client: ArmClient) -> None:
        async def one(index: int) -> None:
            result = await client.chat(self.measurement.prompts[index], self.config.max_new_tokens, mode.temperature)
            mode.records.append(
                Record(mode=mode.name, repeat=repeat, prompt_index=index, arm=client.arm.name, result=result)
            )
            self.advance(mode.name)

        start = time.perf_counter()
        await asyncio.gather(*(one(index) for index in block))
        mode.busy_sec[client.arm.name] += time.perf_counter() - start

    async def _counters(self, client: ArmClient) -> AcceptanceCounts | None:
        try:
            counts = acceptance.parse_acceptance(await client.metrics_text())
        except ValueError as error:
            if self.counters_required:
                raise
            self._note(str(error))
            return None
        self.measurement.num_speculative_tokens = len(counts.num_accepted_per_pos)
        return counts

    async def _close_mode(self, mode: ModeRun, before: AcceptanceCounts | None, client: ArmClient) -> None:
        """The second scrape; a server that died in between is a note, the requests are kept."""
        if before is None:
            return
        try:
            after = acceptance.parse_acceptance(await client.metrics_text())
            mode.acceptance, note = acceptance.window(before, after)
        except ValueError as error:
            note = f"no acceptance: {error}"
        if note:
            self._note(f"{mode.name}: {note}")

    def _note(self, note: str) -> None:
        if note not in self.measurement.notes:
            self.measurement.notes.append(note)


def schedule(num_blocks: int, repeats: int, seed: str) -> Iterator[tuple[int, int, tuple[str, str]]]:
    """``(repeat, block, order of the arms)``: a coin a block, reversed in every odd repeat, so first places balance."""
    rng = random.Random(seed)
    coins: list[bool] = []
    for repeat in range(repeats):
        if repeat % 2 == 0:
            coins = [rng.random() < 0.5 for _ in range(num_blocks)]
        for block in range(num_blocks):
            plain_first = coins[block] != bool(repeat % 2)
            yield repeat, block, (PLAIN, SPEC) if plain_first else (SPEC, PLAIN)


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
