"""The adapter on a stand-in for vLLM's scheduler: what it times, what it asks, and that no failure gets through."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving.policy import Policy, parse_policy
from serving.scheduler import POLICY_VARIABLE, Control, controlled


class Scheduler:
    """The names that the adapter builds on, as vLLM 0.32 has them."""

    def __init__(self, num_spec_tokens: int = 3) -> None:
        self.num_spec_tokens, self.dynamic_sd_lookup = num_spec_tokens, None

    def schedule(self):
        width = self.num_spec_tokens if self.dynamic_sd_lookup is None else self.dynamic_sd_lookup[2]
        return step(2, width, width)

    def update_from_output(self, scheduled, output):
        return "outputs"

    def make_spec_decoding_stats(self, stats, num_draft_tokens, num_accepted_tokens, num_invalid, request_id):
        return stats


def step(batch: int, verified: int, drafted: int, new: int = 0, prompt: int = 0):
    names = [f"r{i}" for i in range(batch)]
    return SimpleNamespace(
        scheduled_spec_decode_tokens={name: [5] * verified for name in names if verified},
        num_scheduled_tokens=dict.fromkeys(names, 1 + verified + prompt),
        scheduled_new_reqs=["r0"] * new,
        num_spec_tokens_to_schedule=drafted,
    )


@pytest.fixture
def control():
    now = [100.0]
    found = Control(Policy(3), clock=lambda: now[0])
    found.now = now
    return found


def run(control, output, seconds: float, wait: float = 0.0) -> None:
    control.now[0] += wait
    control.scheduled(output)
    control.now[0] += seconds
    control.ended()


def test_only_steady_decode_steps_are_timed(control):
    times = control.policy.times
    run(control, step(2, 3, 3, new=1), 9.0)  # a prompt
    run(control, step(2, 3, 3, prompt=40), 9.0)  # a chunk of one
    run(control, step(2, 3, 0), 9.0)  # K is changing: the drafts of one width, the verification of another
    assert times.num_observed(2, 3) == times.num_observed(2, 0) == 0
    run(control, step(2, 3, 3), 0.05, wait=0.01)  # what passes between two steps is part of them
    assert times.estimate(2, 3) == pytest.approx(0.06)
    run(control, step(2, 0, 0), 0.02, wait=5.0)  # an idle engine is not
    assert times.estimate(2, 0) == pytest.approx(0.02)


def test_the_policy_decides_and_learns(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "fixed:2", "conditional_rates": [0.9, 0.8, 0.7]}')
    scheduler = controlled(Scheduler)()
    assert scheduler.schedule().num_spec_tokens_to_schedule == 2
    assert scheduler.update_from_output(None, None) == "outputs"
    assert scheduler.specdec.policy.acceptance.conditional_rates == pytest.approx([0.9, 0.8, 0.7])
    for _ in range(200):
        assert scheduler.make_spec_decoding_stats("stats", 2, 0, None, "r0") == "stats"
    assert scheduler.specdec.policy.acceptance.conditional_rates[0] < 0.3


@pytest.mark.parametrize("hook", ["choose", "scheduled", "ended"])
def test_a_failing_policy_leaves_the_fixed_width_and_a_living_engine(monkeypatch, hook):
    monkeypatch.setenv(POLICY_VARIABLE, "{}")
    scheduler = controlled(Scheduler)()

    def fail(*_):
        raise RuntimeError("broken policy")

    monkeypatch.setattr(scheduler.specdec, hook, fail)
    for _ in range(3):
        scheduler.schedule()
        assert scheduler.update_from_output(None, None) == "outputs"
        scheduler.make_spec_decoding_stats(None, 3, 1, None, "r0")
    assert scheduler.specdec is None and scheduler.dynamic_sd_lookup is None
    assert scheduler.schedule().num_spec_tokens_to_schedule == 3


def test_a_vllm_without_the_names_and_a_bad_setting_leave_it_alone(monkeypatch):
    class Other(Scheduler):
        def __init__(self) -> None:
            super().__init__()
            del self.dynamic_sd_lookup

    assert controlled(Other)().specdec is None
    monkeypatch.setenv(POLICY_VARIABLE, "no json")
    assert controlled(Scheduler)().specdec is None


def test_policies_as_typed():
    assert parse_policy("auto") == ("auto", None) and parse_policy("off") == ("off", None)
    assert parse_policy("fixed:2") == ("fixed", 2)
    for text in ("fixed", "fixed:x", "on", "auto:3"):
        with pytest.raises(ValueError, match="auto, off or fixed:K"):
            parse_policy(text)
