"""Arms that share a machine in slices: who goes next, what counts, and what a failed request does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from experiments.never_slower import slices
from experiments.never_slower.slices import Request, SlicedArm, measure

REQUESTS = [Request(f"task {i}", 10, seed=i) for i in range(6)]


class Server(SlicedArm):
    """A server whose engine makes ``rate`` tokens in each slice of its own, and none while it is frozen."""

    def __init__(self, name: str, rate: int, log: list[str]) -> None:
        self.name, self.rate, self.log = name, rate, log
        self.work, self.figures, self.num_tokens, self.is_frozen = slices.Work(), {"totals": {}}, 0, False
        self.budget = asyncio.Semaphore(0)
        self.client = SimpleNamespace(chat=self.chat)
        self.error = None
        self.seeds = []

    async def chat(self, messages, max_tokens, temperature, seed):
        self.seeds.append(seed)
        for _ in range(max_tokens):
            await self.budget.acquire()
            self.num_tokens += 1
        return SimpleNamespace(error=self.error, error_detail="")

    async def _thaw(self) -> None:
        assert self.is_frozen
        self.is_frozen = False
        self.log.append(self.name)
        for _ in range(self.rate):
            self.budget.release()

    async def freeze(self) -> float:
        assert not self.is_frozen
        self.is_frozen = True
        return asyncio.get_running_loop().time()

    async def finish(self, task) -> None:
        for _ in range(100):
            self.budget.release()
        await super().finish(task)

    async def _running(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_SEC", 0.01)


def run(arms: list[Server], warm_up: list[Request]):
    return asyncio.run(measure(arms, REQUESTS, warm_up, 2, 0.0, 0.01, lambda tokens: None))


def test_the_one_that_has_done_least_goes_next_and_all_do_the_same_work():
    log: list[str] = []
    arms = [Server("slow", 4, log), Server("fast", 12, log)]
    work = run(arms, [])
    assert arms[0].seeds == arms[1].seeds == list(range(6)), "all arms are asked for the same answers"
    assert all("fast" in log[i : i + 5] for i in range(0, 12, 4)), "a fast one waits for the others"
    assert abs(work["slow"].num_tokens[-1] - work["fast"].num_tokens[-1]) <= 12
    for each in work.values():
        assert each.seconds == sorted(each.seconds) and len(each.seconds) == len(each.num_tokens)


def test_only_a_full_load_counts():
    """Two at a time: the last of six requests of ten tokens begins when four are answered and a part of the fifth."""
    log: list[str] = []
    arms = [Server("slow", 4, log), Server("fast", 12, log)]
    work = run(arms, [])
    assert all(40 <= each.num_tokens[-1] <= 50 for each in work.values())
    assert [arm.num_tokens for arm in arms] == [60, 60], "the others are answered before the next load"
    assert all(arm.is_frozen for arm in arms)
    slices_of = {name: len(each.seconds) - 1 for name, each in work.items()}
    assert {name: log.count(name) - 1 for name in slices_of} == slices_of, "the rest is answered in one go"


def test_what_ran_before_does_not_count():
    log: list[str] = []
    arm = Server("one", 5, log)
    work = run([arm], [Request("warm up", 1000)])
    assert arm.num_tokens == 65 and work["one"].num_tokens == list(range(0, 46, 5))


def test_a_failed_request_ends_the_measurement():
    arm = Server("one", 10, [])
    arm.error = "timeout"
    with pytest.raises(ExceptionGroup) as raised:
        run([arm], [])
    assert "one: timeout" in str(raised.value.exceptions[0])
