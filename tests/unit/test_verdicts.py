"""What the experiments conclude: ratios of turns, the tuned table, and which planted fault was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.four_heads.verdict import verdict as four_heads
from experiments.never_slower import verdict as never_slower
from experiments.planted.verdict import verdict as planted
from experiments.r1_traces.verdict import check_mask, completions_of
from specdec.traces import ReasoningTrace, TokenRow, tokenize_trace
from tests.tiny import tiny_tokenizer

ARMS = {"plain": 20.0, "plain_again": 20.4, "auto": 29.0, "random": 19.6, "k1": 24.0, "k2": 30.0, "k3": 27.0}


def write_load(folder: Path, temperature: float, speeds: dict[int, dict[str, float]]) -> None:
    """A finished measurement of some loads: four turns of 100 tokens, the third on a machine at half its speed."""
    cells, blocks = [], []
    for concurrency, arms in speeds.items():
        name = f"greedy c{concurrency}"
        figures = {
            arm: {"throughput_tok_per_sec": speed, "num_requests": 4, "acceptance": None} for arm, speed in arms.items()
        }
        cells.append({"name": name, "concurrency": concurrency, "arms": figures})
        blocks += [
            {
                "cell": name, "arm": arm, "repeat": 0, "block": turn, "num_output_tokens": 100,
                "busy_sec": (2 if turn == 2 else 1) * 100 / speed,
            }
            for turn in range(4)
            for arm, speed in arms.items()
        ]  # fmt: skip
    path = folder / f"c{'-'.join(map(str, speeds))}-t{temperature}"
    path.mkdir()
    (path / "result.json").write_text(json.dumps({"cells": cells, "blocks": blocks}))


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(never_slower, "WORK", tmp_path)
    return tmp_path


def test_ratios_are_of_turns_that_shared_their_moment(work):
    write_load(work, 0.0, {1: ARMS})
    points, summary = never_slower.steady()
    ratios = summary["ratios"]
    assert ratios["trained"]["c1 T0"]["against"] == "k2"
    value, low, high = ratios["trained"]["c1 T0"]["ratio"]
    assert value == pytest.approx(29 / 30) and (low, high) == pytest.approx((value, value)), (
        "a slow turn is slow for all"
    )
    assert summary["worst_ratio_random"] == pytest.approx(0.98)
    assert summary["worst_ratio_plain_again"] == pytest.approx(1.02)
    assert {(point["arm"], point["head"]) for point in points} >= {
        ("auto", "random"),
        ("auto", "trained"),
        ("plain", None),
    }


def test_the_tuned_table_takes_the_fastest_width_of_each_greedy_load(work):
    write_load(work, 0.0, {1: ARMS, 4: {**ARMS, "k3": 40.0}, 16: {**ARMS, "plain": 50.0}})
    write_load(work, 0.6, {1: {**ARMS, "k1": 90.0}})
    assert never_slower.best_table(32) == "1-1:2/2-4:3/5-16:0"
    assert never_slower.best_table(8) == "1-1:2/2-4:3/5-8:0"


def test_acceptance_of_a_width_that_changed_is_that_of_full_drafts():
    assert never_slower.full_length([0.5, 0.5]) == pytest.approx(1.75)
    assert never_slower.full_length([0.5, None]) is None


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
