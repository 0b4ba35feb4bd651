"""At start-up every batch size runs some times, nothing of it counts, and no trouble keeps a server from starting."""

from __future__ import annotations

import asyncio
import itertools
import logging
from argparse import Namespace
from typing import Any

import pytest

from serving import calibration
from serving.calibration import calibrate
from serving.control import CALIBRATION, Control
from serving.engine_status import EngineStatus
from serving.monitor import Monitor
from serving.policy import Policy
from serving.policy_settings import ASYNCHRONOUS
from tests.fake_engine import FakeEngineClient, make_status, plain_status


def run(client: FakeEngineClient) -> list[str]:
    asyncio.run(calibrate(client, EngineStatus(client, {}, timeout_sec=1.0)))
    return [command["command"] for command in client.commands]


def test_in_each_round_every_batch_size_runs_as_one_batch():
    client = FakeEngineClient(make_status())
    assert run(client) == ["status", "calibrated"]
    assert [beside for _, beside in client.generated] == ([1] + [2] * 2 + [4] * 4) * calibration.ROUNDS
    names = [name for name, _ in client.generated]
    assert len(set(names)) == 7 * calibration.ROUNDS and all(name.startswith(CALIBRATION) for name in names)


def test_what_a_server_before_it_timed_is_not_timed_again():
    client = FakeEngineClient(make_status(timed_batch_sizes=[1, 4, 8]))
    assert run(client) == ["status", "calibrated"]
    assert [beside for _, beside in client.generated] == [2] * 2 * calibration.ROUNDS
    client = FakeEngineClient(make_status(timed_batch_sizes=[1, 2, 4]))
    assert run(client) == ["status"] and client.generated == []


@pytest.mark.parametrize(("is_async", "num_drafted"), [(False, 3), (False, 7), (True, 3)])
def test_an_answer_has_room_for_all_trials(is_async: bool, num_drafted: int):
    """No draft of what is made up is accepted, and only steps that verify the K that they draft are timed."""
    config = FakeEngineClient(make_status()).vllm_config
    config.scheduler_config.async_scheduling, config.num_speculative_tokens = is_async, num_drafted
    policy = Policy(num_drafted, settings=ASYNCHRONOUS if is_async else None)
    width = num_tokens = num_steady = 0
    while num_tokens < 10_000 and min(policy.times.num_observed(1, k) for k in range(num_drafted + 1)) < 2:
        verified, width = width, policy.choose(1, is_calibration=True)
        num_tokens += 1
        num_steady = num_steady + 1 if verified == width else 0
        if num_steady and num_steady % policy.settings.steps_per_time == 0:
            policy.observe_step(1, width, 0.02)
    assert num_tokens <= calibration._tokens_of_turns(config)
    config.model_config.max_model_len = 20
    assert calibration._tokens_of_turns(config) == 20 - len(calibration.PROMPT_IDS)


@pytest.mark.parametrize("status", [make_status(policy="off"), make_status(policy="fixed:2"), plain_status()])
def test_only_a_policy_that_chooses_is_calibrated(status: dict[str, Any]):
    client = FakeEngineClient(status)
    assert run(client) == ["status"] and client.generated == []


def test_a_slow_machine_starts_all_the_same(monkeypatch):
    monkeypatch.setattr(calibration, "LONGEST_SEC", 0.1)
    client = FakeEngineClient(make_status())
    client.hangs = True
    assert run(client) == ["status", "calibrated"] and client.generated == []


@pytest.mark.parametrize("trouble", [RuntimeError("no such method"), "silent"])
def test_trouble_is_a_line_in_the_log(trouble, caplog):
    client = FakeEngineClient(make_status())
    client.trouble = trouble
    with caplog.at_level(logging.WARNING, logger="vllm.specdec"):
        assert run(client) == ["status"]
    assert "timed later" in caplog.text


@pytest.mark.parametrize(("name", "timed"), [(f"{CALIBRATION}-1-0", [0, 1, 2, 3]), ("chat-1", [0, 3])])
def test_every_width_is_timed_on_a_made_up_batch_alone(name, timed):
    control = Control(Policy(3), Monitor(3))
    times = control.policy.times
    width = 0
    for _ in range(14 if name == "chat-1" else 40):  # until a served K is timed beside others, anyhow
        verified, width = width, control.choose(1, [name])
        if verified == width:
            control.policy.observe_step(1, width, 0.02 + 0.01 * width)
    assert [k for k in range(4) if times.num_observed(1, k) >= 2] == timed


def test_a_made_up_batch_times_every_width_in_turn_whatever_is_accepted():
    policy = Policy(3)
    widths = []
    for _ in range(96):
        widths.append(policy.choose(4, is_calibration=True))
        policy.observe_drafts({(3, 0): 4})
    blocks = [width for width, _ in itertools.groupby(widths)]
    assert {width: widths.count(width) for width in range(4)} == dict.fromkeys(range(4), 24)
    assert min(blocks.count(width) for width in range(4)) >= 4, "what slows the machine for a while meets all of them"


def test_what_was_seen_is_forgotten_and_what_was_timed_is_not():
    rates = [0.6, 0.5, 0.4]
    control = Control(Policy(3, rates), Monitor(3, rates), trained_rates=rates)
    for _ in range(40):
        control.policy.observe_drafts({(3, 0): 1})
        control.policy.observe_step(1, 3, 0.04)
        control.policy.observe_step(1, 0, 0.02)
        control.monitor.observe_step(1, 3, 0.04, 1, 1.0, lambda batch: None)
    control.calibrated()
    assert control.policy.acceptance.conditional_rates == pytest.approx(rates)
    assert control.policy.times.estimates(1, 3)[::3] == pytest.approx([0.02, 0.04])
    for _ in range(2):  # a served step is longer, whatever is drafted
        control.policy.observe_step(1, 3, 0.05)
    assert control.policy.times.estimate(1, 0) == pytest.approx(0.025, rel=0.05)
    assert control.status()["totals"]["num_steps"] == 0 and control.status()["k_histogram"] == {}


def test_requests_that_nobody_sent_are_never_kept():
    kept = []
    traffic = Namespace(finished=lambda prompt, completion: kept.append((prompt, completion)))
    control = Control(None, Monitor(0), traffic=traffic)
    for name in (f"{CALIBRATION}-1-0-abc", "cmpl-1"):
        control.finished(Namespace(request_id=name, prompt_token_ids=[1], output_token_ids=[2]))
    assert kept == [([1], [2])]
