"""The control in a simulated engine that schedules each step while the one before it runs, and is late now and then."""

from __future__ import annotations

import random
from collections import Counter, deque
from types import SimpleNamespace

import pytest

from serving.control import Control
from serving.monitor import Monitor
from serving.policy import Policy
from serving.policy_settings import ASYNCHRONOUS

K = 3
GOOD, BAD = (0.73, 0.7, 0.7), (0.02, 0.02, 0.02)
REQUEST = {"prompt_token_ids": [1], "output_token_ids": [2]}


def gpu_sec(batch: int, width: int) -> float:
    return 0.0015 + 0.00001 * batch * (width + 1) + (0.0002 + 0.0002 * width if width else 0.0)


class Engine:
    """A GPU that works off what is launched, and a scheduler's loop: schedule, await the step before, book it."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.now, self.gpu_free, self.random = 0.0, 0.0, random.Random(seed)
        self.control = Control(policy, Monitor(K), clock=lambda: self.now)
        self.running: deque[tuple[float, int]] = deque()  # end on the GPU, drafts that it verifies
        self.width, self.tokens, self.widths = 0, 0, Counter()

    def run(self, steps: int, batch: int, rates) -> None:
        names = [f"r{i}" for i in range(batch)]
        for _ in range(steps):
            verified, self.width = self.width, self.control.choose(batch, names)
            self.control.scheduled(
                SimpleNamespace(
                    scheduled_spec_decode_tokens={name: [5] * verified for name in names if verified},
                    num_scheduled_tokens=dict.fromkeys(names, 1 + verified),
                    scheduled_new_reqs=[], num_spec_tokens_to_schedule=self.width,
                )
            )  # fmt: skip
            self.now += 0.0003
            self.gpu_free = max(self.now, self.gpu_free) + gpu_sec(batch, verified)
            self.running.append((self.gpu_free, verified))
            if len(self.running) == 2:
                self.book(*self.running.popleft(), names, rates)

    def book(self, ended: float, verified: int, names: list[str], rates) -> None:
        self.now = max(self.now, ended) + 0.0004
        if self.random.random() < 0.1:
            self.now += self.random.expovariate(1 / 0.002)  # something else holds the interpreter
        self.widths[verified] += 1
        for name in names:
            accepted = 0
            while accepted < verified and self.random.random() < rates[accepted]:
                accepted += 1
            self.tokens += 1 + accepted
            if verified:
                self.control.drafted(SimpleNamespace(request_id=name, **REQUEST), verified, accepted)
        self.control.ended(len(names), lambda _: True)


def speed(policy: Policy, batch: int, rates, seed: int = 0, steps: int = 6000) -> tuple[float, Engine]:
    """Tokens a second after the first fifth."""
    engine = Engine(policy, seed)
    engine.run(steps // 5, batch, rates)
    tokens, begun = engine.tokens, engine.now
    engine.run(steps, batch, rates)
    return (engine.tokens - tokens) / (engine.now - begun), engine


def fixed(width: int) -> Policy:
    policy = Policy(K, settings=ASYNCHRONOUS)
    policy.set_mode("fixed", width)
    return policy


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("rates", [GOOD, BAD])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_as_fast_as_the_best_fixed_width(batch, rates, seed):
    best = max(speed(fixed(width), batch, rates, seed)[0] for width in range(K + 1))
    found, engine = speed(Policy(K, settings=ASYNCHRONOUS), batch, rates, seed)
    assert found > 0.95 * best, engine.widths


def test_a_head_that_turns_good_again_is_found_by_a_probe():
    """The outcome of a probe's last step comes after the next step is scheduled."""
    policy = Policy(K, settings=ASYNCHRONOUS)
    engine = Engine(policy, seed=0)
    engine.run(1500, 16, BAD)
    assert policy.chosen == 0
    for _ in range(20):
        engine.run(500, 16, GOOD)
        if policy.chosen >= 2:  # which of the two hardly matters
            return
    raise AssertionError(engine.widths)
