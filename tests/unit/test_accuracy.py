"""Accuracy against figures worked out by hand, and intervals that never claim certainty."""

from __future__ import annotations

import math

import pytest

from specdec.evaluation.accuracy import accuracy_differences, accuracy_rows, majority_correct, wilson_ci95
from specdec.evaluation.records import BlockRun, Cell, Measurement, Record, RequestResult


def record(item, sample=0, correct=True, answer="1", arm="plain", error=None, tokens=10, **changes):
    result = RequestResult(error=error, num_output_tokens=None if error else tokens)
    options = {"arm": arm, "cell": "sampled", "suite": "maths", "item_id": item, "sample": sample}
    return Record(**{**options, "correct": correct, "answer": answer, **changes}, result=result)


def failed(item, **changes):
    return record(item, correct=None, answer=None, error="timeout", **changes)


def measured(*records, arms=("plain", "head")):
    runs = [
        BlockRun(arm=r.arm, cell=r.cell, suite=r.suite, repeat=r.repeat, block=0, busy_sec=1.0, records=[r])
        for r in records
    ]
    return Measurement(cells=[Cell(name="sampled", temperature=0.6)], baseline="plain", arms=list(arms), runs=runs)


def test_golden_row():
    (row,) = accuracy_rows(
        measured(
            *(record("a", i, answer == "4", answer) for i, answer in enumerate("445")),
            *(record("b", i, False, None, tokens=40) for i in range(3)),
            record("c", 0, True, "7"),
            failed("c", sample=1),
        )
    )  # fmt: skip
    assert (row["cell"], row["arm"], row["suite"]) == ("sampled", "plain", "maths")
    assert row["pass_at_1"] == pytest.approx((2 / 3 + 0 + 1) / 3)  # the failed sample of c is not a wrong one
    assert row["maj_at_n"] == pytest.approx(2 / 3)
    assert (row["num_items"], row["num_samples"], row["num_unanswered"], row["num_failed"]) == (3, 3, 3, 1)
    assert row["mean_output_tokens"] == pytest.approx((4 * 10 + 3 * 40) / 7)
    assert row["pass_at_1_ci95"][0] < row["pass_at_1"] < row["pass_at_1_ci95"][1]
    assert row["sec_per_answer"] == 1.0


def test_items_weigh_the_same_however_many_samples_they_have():
    records = [record("a", i, True) for i in range(9)] + [record("b", 0, False)]
    assert accuracy_rows(measured(*records))[0]["pass_at_1"] == pytest.approx(0.5)


def test_the_interval_is_clustered_over_items():
    # 8 samples of each of 10 items, an item's samples all alike: 10 independent facts, not 80.
    records = [record(str(item), sample, item < 5) for item in range(10) for sample in range(8)]
    low, high = accuracy_rows(measured(*records))[0]["pass_at_1_ci95"]
    expected = 2 * 1.96 * math.sqrt(0.25 / 10)
    assert high - low == pytest.approx(expected, abs=0.15)
    assert high - low > 2 * (2 * 1.96 * math.sqrt(0.25 / 80))


@pytest.mark.parametrize(("correct", "interval"), [(True, (0.7225, 1.0)), (False, (0.0, 0.2775))])
def test_items_that_all_agree_leave_doubt(correct, interval):
    (row,) = accuracy_rows(measured(*(record(str(i), correct=correct) for i in range(10))))
    assert row["pass_at_1"] == float(correct) and row["pass_at_1_ci95"] == pytest.approx(interval, abs=1e-4)


def test_wilson_golden():
    assert wilson_ci95(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    with pytest.raises(ValueError, match="at least one item"):
        wilson_ci95(0.5, 0)


def test_only_the_first_turn_of_the_first_repeat_counts():
    records = [record("a"), record("a", correct=False, turn=1), record("a", correct=False, repeat=1)]
    (row,) = accuracy_rows(measured(*records))
    assert (row["pass_at_1"], row["num_samples"], row["maj_at_n"], row["maj_at_n_ci95"]) == (1.0, 1, None, None)


def test_without_a_checked_answer_there_is_no_row():
    assert accuracy_rows(measured(record("a", correct=None, answer=None), failed("b"))) == []
    assert accuracy_rows(measured()) == [] and accuracy_differences(measured()) == []


def test_suites_and_arms_have_their_own_rows():
    records = [record("a"), record("a", arm="head", correct=False), record("a", suite="logic", tokens=None)]
    rows = {(row["arm"], row["suite"]): row for row in accuracy_rows(measured(*records))}
    assert set(rows) == {("plain", "maths"), ("head", "maths"), ("plain", "logic")}
    assert rows["head", "maths"]["pass_at_1"] == 0 and rows["plain", "logic"]["mean_output_tokens"] is None


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("4", True), ("5", False), ("5", False)], False),
        ([("4", True), ("5", False)], True),  # a tie: the first seen
        ([("5", False), ("4", True)], False),
        ([(None, False), (None, False), ("4", True)], True),  # no answer, no vote
        ([(None, False)], False),
    ],
)
def test_majority(answers, expected):
    samples = [record("a", i, correct, answer) for i, (answer, correct) in enumerate(answers)]
    assert majority_correct(samples) is expected
    assert majority_correct(samples[::-1]) is expected  # "first" goes by sample, not by time of arrival


def test_differences_are_paired_by_item():
    # Items range from never to always right; the arm loses one sample of two on two items of ten.
    records = []
    for item in range(10):
        for sample in range(2):
            records.append(record(str(item), sample, item < 5))
            records.append(record(str(item), sample, item < 5 and not (item < 2 and sample), arm="head"))
    records += [record("only plain"), record("only head", arm="head", correct=False)]
    (row,) = accuracy_differences(measured(*records))
    assert (row["cell"], row["suite"], row["arm"], row["num_items"]) == ("sampled", "maths", "head", 10)
    assert row["difference"] == pytest.approx(-0.1)
    low, high = row["ci95"]
    assert -0.3 < low < -0.1 < high <= 0  # unpaired, the spread between items would give about ±0.4


def test_no_difference_in_few_items_is_no_proof():
    few, many = (
        accuracy_differences(measured(*(record(str(i), arm=arm) for i in range(n) for arm in ("plain", "head"))))[0]
        for n in (10, 100)
    )
    assert few["difference"] == 0 and few["ci95"] == pytest.approx([-0.2775, 0.2775], abs=1e-4)
    assert many["ci95"] == pytest.approx([-0.0370, 0.0370], abs=1e-4)


def test_an_item_that_failed_on_one_arm_is_not_compared():
    records = [record("a"), record("b"), record("a", arm="head"), failed("b", arm="head")]
    (row,) = accuracy_differences(measured(*records))
    assert (row["difference"], row["num_items"]) == (0.0, 1)
