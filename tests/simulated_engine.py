"""An engine whose truth is known: what a step takes and what is accepted. The policy is run in it, step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from serving.policy import Policy

K = 3
GOOD, BAD = (0.65, 0.6, 0.55), (0.05, 0.05, 0.05)


def step_sec(batch: int, width: int) -> float:
    """A step of 20 ms that grows with what is verified, and a head of 2 ms a token."""
    return 0.020 + 0.0012 * batch * (width + 1) + 0.002 * width


def dear_first_step(batch: int, width: int) -> float:
    """As measured: whatever is drafted costs something at once, and a larger batch more for each draft."""
    drafts = min(width, 1) * (0.1 + 0.012 * batch) + width * (0.06 + 0.006 * batch)
    return (0.02 + 0.0028 * batch) * (1 + drafts)


def expected(rates, width: int) -> float:
    total = reached = 1.0
    for rate in rates[:width]:
        reached *= rate
        total += reached
    return total


def best_goodput(batch: int, rates, cost: Callable[[int, int], float] = step_sec) -> float:
    return max(batch * expected(rates, width) / cost(batch, width) for width in range(K + 1))


class Disturbed:
    """``cost`` on a shared machine: for a fifth of a second or more at a time it is as fast as ever or much slower."""

    def __init__(self, seed: int, cost: Callable[[int, int], float]) -> None:
        self.random, self.cost, self.slowness = random.Random(seed), cost, 1.0

    def __call__(self, batch: int, width: int) -> float:
        seconds = self.cost(batch, width)
        if self.random.random() < seconds / 0.2:
            self.slowness = self.random.choice([1.0, 1.0, 1.25, 1.6])
        return seconds * self.slowness


class Engine:
    """Runs a policy step by step and sums what it gained and what the best fixed K would have gained."""

    def __init__(self, policy: Policy, seed: int = 0, noise: float = 0.05, cost=step_sec, drift: float = 0.0) -> None:
        """``drift``: standard deviation of the machine's own speed, which takes some 200 steps to change."""
        self.policy, self.random, self.noise, self.cost = policy, random.Random(seed), noise, cost
        self.drift, self.slowness = drift, 0.0
        self.tokens = self.seconds = self.oracle_tokens = self.plain_tokens = 0.0
        self.widths: list[int] = []

    def run(self, steps: int, batch: int, rates) -> Engine:
        for _ in range(steps):
            width = self.policy.choose(batch)
            self.slowness = 0.995 * self.slowness + 0.1 * self.random.gauss(0, self.drift)
            seconds = self.cost(batch, width) * max(0.5, self.random.gauss(1, self.noise)) * math.exp(self.slowness)
            speed = math.exp(-self.slowness)
            for _ in range(batch):
                accepted = 0
                while accepted < width and self.random.random() < rates[accepted]:
                    accepted += 1
                self.tokens += accepted + 1
                if width:
                    self.policy.observe_drafts({(width, accepted): 1})
            if self.widths and self.widths[-1] == width:
                self.policy.observe_step(batch, width, seconds)
            self.widths.append(width)
            self.seconds += seconds
            self.oracle_tokens += seconds * speed * best_goodput(batch, rates, self.cost)
            self.plain_tokens += seconds * speed * batch / self.cost(batch, 0)
        return self

    @property
    def against_oracle(self) -> float:
        return self.tokens / self.oracle_tokens

    @property
    def against_plain(self) -> float:
        return self.tokens / self.plain_tokens
