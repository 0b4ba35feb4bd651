"""What the experiments conclude: ratios of slices, the tuned table, and which planted fault was found."""

from __future__ import annotations

import dataclasses
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from experiments.four_heads.verdict import verdict as four_heads
from experiments.never_slower import control, steady
from experiments.never_slower import verdict as never_slower
from experiments.planted.verdict import verdict as planted
from experiments.r1_traces.verdict import check_mask, completions_of
from specdec.traces import ReasoningTrace, TokenRow, tokenize_trace
from tests.tiny import tiny_tokenizer

ARMS = {"plain": 20.0, "auto": 29.0, "random": 19.6, "k1": 24.0, "k2": 30.0, "k3": 27.0}
FIGURES = {
    "num_drafts": 100, "num_accepted_tokens": 80, "decode_sec": 8.0, "fallback_sec": 2.0,
    "reached_per_position": [100], "accepted_per_position": [80],
}  # fmt: skip


def write_load(temperature: float, concurrency: int, speeds: dict[str, float], moods=(1, 1, 2, 1), life=0) -> None:
    """A finished measurement: 400 tokens in slices of 100, for all alike one of them on a machine at half its speed."""
    work = {
        name: {
            "num_tokens": [0, 100, 200, 300, 400],
            "seconds": [0.0, *accumulate(mood * 100 / speed for mood in moods)],
            "before": {"totals": {}, "k_histogram": {}},
            "after": {"totals": {}, "k_histogram": {}} if name == "plain" else after(FIGURES),
        }
        for name, speed in speeds.items()
    }
    load = {"temperature": temperature, "concurrency": concurrency, "num_requests": 4, "work": work}
    path = steady.load_path(concurrency, temperature, life)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(load))


def after(figures: dict[str, Any]) -> dict[str, Any]:
    return {"totals": figures, "k_histogram": {"1": figures["num_drafts"]}}


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(steady, "WORK", tmp_path)
    return tmp_path


def test_the_control_holds_each_server_against_the_fastest_other(work):
    assert never_slower.control() == {}, "not measured"
    write_load(0.0, 8, {"server1": 20.0, "server2": 25.0, "server3": 24.0})
    control.control_path(8).parent.mkdir()
    steady.load_path(8, 0.0).rename(control.control_path(8))
    found = never_slower.control()
    assert found["control_ratios"] == {"c8": pytest.approx([20 / 25, 25 / 24, 24 / 25])}
    assert found["worst_ratio_control"] == pytest.approx(0.8)


def test_ratios_are_of_slices_that_shared_their_moment(work):
    write_load(0.0, 1, ARMS)
    points, summary = never_slower.steady()
    found = summary["ratios"]["trained"]["c1 T0"]
    assert found["against"] == "k2"
    assert found["ratio"] == pytest.approx([29 / 30] * 3), "a slow moment is slow for all"
    assert summary["worst_ratio_random"] == pytest.approx(0.98)
    by_arm = {(point["arm"], point["head"]): point for point in points}
    assert by_arm["auto", "trained"]["acceptance_length"] == pytest.approx(1.8)
    assert by_arm["auto", "random"]["fallback_share"] == pytest.approx(0.25)
    assert by_arm["plain", None]["acceptance_length"] is None and by_arm["plain", None]["runs"] == 4


def test_lives_of_the_servers_count_together_and_stand_one_by_one(work):
    write_load(0.0, 1, ARMS)
    write_load(0.0, 1, {**ARMS, "auto": 31.0, "k2": 28.0, "k3": 29.0}, life=1)
    write_load(0.6, 1, ARMS, life=1)  # one life has no such load (yet)
    points, summary = never_slower.steady()
    found = summary["ratios"]["trained"]["c1 T0"]
    together = (1 / 30 + 1 / 28) / (1 / 29 + 1 / 31)
    assert found["against"] == "k2" and found["ratio"][0] == pytest.approx(together)
    assert found["by_life"] == pytest.approx([29 / 30, 31 / 28])
    assert summary["ratios"]["trained"]["c1 T0.6"]["by_life"] == pytest.approx([29 / 30])
    first = next(point for point in points if point["arm"] == "auto" and point["head"] == "trained")
    assert first["runs"] == 8 and first["num_requests"] == 8
    assert first["acceptance_length"] == pytest.approx(1.8) and first["fallback_share"] == pytest.approx(0.25)


def test_lives_of_the_load_that_changes_count_together(work):
    assert never_slower.shift() == {}, "not measured"
    for life, table in enumerate((30.0, 25.0)):
        write_load(0.0, 8, {"plain": 20.0, "table": table, "auto": 28.0})
        load = json.loads(steady.load_path(8, 0.0).read_text())
        phases = dict.fromkeys(("before", "changed", "after"), load["work"])
        steady.shift_path(life).write_text(json.dumps({"phases": phases}))
    found = never_slower.shift()
    assert found["shift_num_lives"] == 2
    assert found["shift_auto_against"]["table"]["after"][0] == pytest.approx((28 / 30 + 28 / 25) / 2)
    assert found["shift_auto_against_table_by_life"]["before"] == pytest.approx([28 / 30, 28 / 25])
    assert found["shift_tau_after_resume"] == pytest.approx(1.8)


def test_the_whole_interval_tells_where_the_policy_is_surely_slower(work):
    write_load(0.0, 1, ARMS)  # 0.967 of the best
    write_load(0.0, 2, {**ARMS, "auto": 30.0, "random": 20.0})
    write_load(0.0, 4, {**ARMS, "auto": 28.0})
    load = json.loads(steady.load_path(4, 0.0).read_text())
    load["work"]["auto"]["seconds"] = [0.0, *accumulate([3.5, 3.5, 9.0, 1.0])]  # once three times as fast as the best
    steady.load_path(4, 0.0).write_text(json.dumps(load))
    _, summary = never_slower.steady()
    ratios = [each["ratio"][0] for each in summary["ratios"]["trained"].values()]
    assert ratios[2] < 0.99 and summary["num_surely_slower_trained"] == 1
    assert json.loads(json.dumps(summary))["num_surely_slower_random"] == 0
    assert summary["mean_ratio_random"] == pytest.approx((0.98 * 1.0 * 0.98) ** (1 / 3))


def test_an_arm_that_was_lucky_in_one_half_is_not_the_best_of_the_other(work):
    """k1 and k2 take turns in being fast: whichever one half names is the slower one in the other."""
    write_load(0.0, 2, {**ARMS, "k1": 25.0, "k2": 25.0, "k3": 20.0, "auto": 25.0})
    path = steady.load_path(2, 0.0)
    load = json.loads(path.read_text())
    tokens = [100 * i for i in range(never_slower.NUM_PARTS + 1)]
    for name, first in (("k1", 3.0), ("k2", 5.0)):
        seconds = [0.0, *accumulate(first if i % 2 == 0 else 8.0 - first for i in range(never_slower.NUM_PARTS))]
        load["work"][name] |= {"num_tokens": tokens, "seconds": seconds}
    for name in ("plain", "k3", "auto", "random"):
        seconds = [4.0 * i for i in range(never_slower.NUM_PARTS + 1)]
        load["work"][name] |= {"num_tokens": tokens, "seconds": seconds}
    path.write_text(json.dumps(load))
    assert never_slower.ratio(load, "auto", "k1")[0] == pytest.approx(1.0)
    assert never_slower.held_out(load, "auto") == pytest.approx(5 / 4)


def test_the_tuned_table_takes_the_fastest_width_of_each_greedy_load(work):
    write_load(0.0, 1, ARMS)
    write_load(0.0, 4, {**ARMS, "k3": 40.0})
    write_load(0.0, 16, {**ARMS, "plain": 50.0})
    write_load(0.6, 1, {**ARMS, "k1": 90.0})
    assert never_slower.best_table(32) == "1-1:2/2-4:3/5-16:0"
    assert never_slower.best_table(8) == "1-1:2/2-4:3/5-8:0"


def test_acceptance_of_a_width_that_changed_is_that_of_full_drafts():
    first = {"reached_per_position": [100, 20], "accepted_per_position": [50, 10]}
    assert never_slower.tokens_by_width([first]) == pytest.approx([1.0, 1.5, 1.75])
    unreached = {"reached_per_position": [100, 0], "accepted_per_position": [0, 0]}
    assert never_slower.tokens_by_width([first, unreached]) == pytest.approx([1.0, 1.25, 1.375])
    assert never_slower.tokens_by_width([unreached]) == [1.0, 1.0, 1.0]


def planted_result(**intervals: list[float]) -> dict[str, Any]:
    arms = ("same", "slow", "drafts", "sampler")
    taken = {arm: intervals.get(arm, [0.98, 1.02]) for arm in arms}
    lost = {"drafts": [0.93, 0.97]}
    return {
        "cells": [{
            "comparisons": {
                arm: {
                    "speedup_median": 1.0, "speedup_ci95": taken[arm], "acceptance_ratio_mean": 1.0,
                    "acceptance_ratio_ci95": lost.get(arm, [1.0, 1.0]),
                } for arm in arms
            }
        }],
        "losslessness": {
            "distribution": [{"arm": arm, "lossy": arm == "sampler", "p_value": 0.5} for arm in arms],
            "greedy": [{"arm": arm, "greedy_identity_rate": 1.0} for arm in arms],
        },
        "notes": [], "provenance": {},
    }  # fmt: skip


def test_a_planted_fault_counts_as_found_when_its_interval_leaves_one_out():
    found = planted(planted_result(slow=[0.86, 0.97]))
    assert found["detected"] == {"slowdown": True, "acceptance": True, "sampler": True}
    assert found["aa_ci95"] == [0.98, 1.02] and not any(found["false_alarms"].values())
    missed = planted(planted_result(slow=[0.86, 1.01], same=[1.01, 1.05]))
    assert not missed["detected"]["slowdown"] and missed["false_alarms"]["slowdown"] == ["same"]


def test_a_heads_step_is_laid_beside_a_plain_one():
    def figures(step_sec: float) -> dict[str, Any]:
        return {"acceptance": None, "step_sec_p50": step_sec, "tpot_sec": {"p50": step_sec}}

    found = four_heads(
        {
            "arms": [{"name": name, "baseline": name == "plain", "options": {}} for name in ("plain", "lookup")],
            "cells": [
                {"name": "greedy", "arms": {"plain": figures(0.020), "lookup": figures(0.026)}, "comparisons": {}}
            ],
            "losslessness": {"greedy": []}, "notes": [], "provenance": {}, "requests": [],
        },
        {},
        {"lookup": 1.5},
    )  # fmt: skip
    plain, lookup = found["arms"]
    assert (plain["trained_on_served_answers"], lookup["trained_on_served_answers"]) == (None, 1.5)
    assert plain["step_cost_sec"] is None and lookup["step_cost_sec"] == pytest.approx(0.006)


def test_a_mask_that_is_not_the_traces_reasoning_and_response_is_named(tmp_path):
    item = {"problem": "7*6?", "reasoning": "six sevens", "response": "42"}
    (tmp_path / "traces.jsonl").write_text(json.dumps(item) + "\n")
    texts = completions_of(str(tmp_path / "traces.jsonl"))
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="7*6?", reasoning="six sevens", response="42"))
    assert check_mask([row, row], tiny_tokenizer(), texts) == 2

    def wrong(**changes: Any) -> TokenRow:
        return dataclasses.replace(row, **changes)

    shifted = [*row.loss_mask[1:], 1]
    for broken in (wrong(loss_mask=shifted), wrong(think_span=(row.think_span[0], row.think_span[1] - 1))):
        with pytest.raises(ValueError, match=row.conversation_id):
            check_mask([broken], tiny_tokenizer(), texts)
    with pytest.raises(ValueError, match="the mask holds"):
        check_mask([row], tiny_tokenizer(), {"7*6?": {"another trace"}})
