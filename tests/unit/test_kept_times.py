"""What one server learns of step times the next one starts from; a file that is of no use costs a line in the log."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest

from serving.control import Control
from serving.kept_times import SAVE_SEC, times_path
from serving.monitor import Monitor
from serving.policy import Policy

K = 3


def taught(policy: Policy) -> Policy:
    """K = 1 is best by a tenth where half of the drafts are accepted."""
    rng = random.Random(0)
    for _ in range(60):
        for width, seconds in enumerate((0.02, 0.024, 0.031, 0.035)):
            for sampled in (False, True):
                policy.observe_step(8, width, seconds * (1 + 0.2 * sampled) * rng.gauss(1, 0.05), sampled)
    return policy


def served(path: Path) -> tuple[Control, list[float]]:
    clock = [0.0]
    return Control(Policy(K), Monitor(K), times_path=str(path), clock=lambda: clock[0]), clock


def test_the_next_server_knows_what_this_one_learned(tmp_path):
    path = tmp_path / "new" / "times.json"
    control, clock = served(path)
    assert control.status()["timed_batch_sizes"] == [] and not path.exists()
    taught(control.policy)
    clock[0] = SAVE_SEC
    assert control.status()["timed_batch_sizes"] == [8] and path.is_file()
    after, _ = served(path)
    assert after.status()["timed_batch_sizes"] == [8]
    for sampled in (False, True):
        after.policy.choose(8, sampled)
        control.policy.choose(8, sampled)
        assert after.policy.times.estimates(8, K) == pytest.approx(control.policy.times.estimates(8, K))
    for _ in range(24):
        after.policy.observe_drafts({(K, 0): 4})
        after.policy.observe_drafts({(K, 1): 2})
        after.policy.observe_drafts({(K, 2): 2})
        after.policy.choose(8)
    assert after.policy.chosen == 1, after.policy.reason


@pytest.mark.parametrize("held", ["off", "fixed:2"])
def test_a_server_whose_k_is_held_leaves_what_another_learned(tmp_path, held):
    path = tmp_path / "times.json"
    control, clock = served(path)
    control.set_policy(held)
    for _ in range(60):
        control.policy.observe_step(8, 2, 0.03)
    clock[0] = SAVE_SEC
    control.status()
    assert not path.exists()
    control.set_policy("auto")
    clock[0] = 2 * SAVE_SEC
    control.status()
    assert path.is_file()


def test_what_a_single_short_turn_told_is_timed_again_by_the_next_server():
    policy = Policy(K)
    for num_steps in (5, 10):
        for width in (K, 0):
            for _ in range(5):
                policy.observe_step(4, width, 0.02 + 0.005 * width)
        assert policy.timed_batch_sizes == ([4] if num_steps == 10 else [])
    assert policy.times.estimate(4, K) == pytest.approx(0.035, rel=0.01)


def test_the_next_server_soon_learns_that_the_machine_is_slower(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps(taught(Policy(K)).times_as_json()))
    policy = served(path)[0].policy
    for _ in range(3):
        policy.observe_step(8, 0, 0.04)
    assert policy.times.estimates(8, K) == pytest.approx([0.04, 0.048, 0.062, 0.07], rel=0.1)


def test_what_start_up_timed_is_kept_at_once(tmp_path):
    control, _ = served(tmp_path / "times.json")
    taught(control.policy)
    control.calibrated()
    assert served(tmp_path / "times.json")[0].policy.timed_batch_sizes == [8]


def test_it_is_written_once_a_minute(tmp_path):
    path = tmp_path / "times.json"
    control, clock = served(path)
    clock[0] = SAVE_SEC
    control.status()
    path.unlink()
    clock[0] += SAVE_SEC - 1
    control.status()
    assert not path.exists()
    clock[0] += 1
    control.status()
    assert path.exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"greedy": {"noise": 1, "sizes": {}}, "sampled": null}', "WIDTHS", "NAN"],
)
def test_a_file_of_no_use_is_written_anew(tmp_path, text, caplog):
    tree = taught(Policy(K)).times_as_json()
    if text == "WIDTHS":
        tree["sampled"]["sizes"]["8"]["widths"].pop()
    if text == "NAN":
        tree["greedy"]["sizes"]["8"]["state"][1] = float("nan")
    path = tmp_path / "times.json"
    path.write_text(json.dumps(tree) if text in ("WIDTHS", "NAN") else text)
    with caplog.at_level(logging.WARNING, logger="vllm.specdec"):
        control, clock = served(path)
    assert "is not used" in caplog.text
    assert control.policy.timed_batch_sizes == [] and control.policy.choose(8) == K
    taught(control.policy)
    clock[0] = SAVE_SEC
    control.status()
    assert served(path)[0].policy.timed_batch_sizes == [8]


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    control, clock = served(tmp_path / "file" / "times.json")
    clock[0] = SAVE_SEC
    assert control.status()["timed_batch_sizes"] == []
    assert "not kept" in caplog.text


def test_servers_of_another_kind_have_files_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path))
    assert times_path("a", "b") == times_path("a", "b") != times_path("ab")
    assert times_path("a").parent == tmp_path / "step_times"
