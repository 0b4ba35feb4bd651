"""``experiments/vs_speculators``: processes that train in turns, and whose time counts only while they run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from experiments.vs_speculators.turns import Side, Step, overlap_sec, take_turns

TRAINS = """
import json, sys, time
num_steps = int(sys.argv[2])
memory = bytearray(int(sys.argv[3]) * 2**20)
with open(sys.argv[1], "a", buffering=1) as file:
    for _ in range(num_steps):
        begin = time.monotonic()
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        file.write(json.dumps({"begin": begin, "end": time.monotonic(), "tokens": 10}) + "\\n")
"""


def side(tmp_path: Path, name: str, *arguments: str) -> Side:
    return Side(name=name, command=[sys.executable, "-c", TRAINS, "MARKS", *arguments], folder=tmp_path / name)


def test_only_time_that_a_process_ran_counts():
    step = Step(begin=1.0, end=9.0, tokens=5)
    assert overlap_sec(step, [(0.0, 2.0), (4.0, 5.0), (8.5, 12.0)]) == pytest.approx(1.0 + 1.0 + 0.5)
    assert overlap_sec(step, [(10.0, 11.0)]) == 0.0


def test_sides_alternate_and_each_is_charged_for_itself(tmp_path: Path):
    sides = [side(tmp_path, "small", "8", "1"), side(tmp_path, "large", "8", "200")]
    take_turns(sides, turn_sec=0.15, planned_sec=0.4, label="test")
    small, large = sides
    assert small.exit_code == large.exit_code == 0
    assert [len(each.steps()) for each in sides] == [8, 8]
    assert all(len(each.ran) >= 2 for each in sides)
    turns = sorted(interval for each in sides for interval in each.ran)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(turns))  # never two at a time
    for each in sides:
        assert 0 < each.trained_sec <= each.process_sec
    assert large.peak_memory_bytes - small.peak_memory_bytes > 150 * 2**20
    assert small.peak_memory_bytes < 100 * 2**20  # nothing of this process, which holds much more in a whole test run


def test_a_short_run_ends_every_side(tmp_path: Path):
    endless = [side(tmp_path, name, "100000", "1") for name in "ab"]
    take_turns(endless, turn_sec=0.1, planned_sec=0.2, label="test", enough=lambda each: each.trained_sec >= 0.2)
    assert all(not each.is_alive and each.trained_sec >= 0.2 for each in endless)


def test_a_side_that_fails_is_named_with_its_log(tmp_path: Path):
    broken = side(tmp_path, "broken", "no number", "1")
    with pytest.raises(ValueError, match=r"broken failed.*(?s:.)*invalid literal"):
        take_turns([side(tmp_path, "whole", "100000", "1"), broken], turn_sec=0.1, planned_sec=0.2, label="test")
