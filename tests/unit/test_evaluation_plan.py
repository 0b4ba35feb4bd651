"""Cells, order of the arms, arrivals, and the journal that a run resumes from."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.config import EvalConfig
from specdec.evaluation import load
from specdec.evaluation.journal import Journal
from specdec.evaluation.plan import cells_of, num_requests, steps_of
from specdec.evaluation.records import BlockRun, Record, RequestResult
from specdec.evaluation.suites import Item, Suite
from specdec.metrics import AcceptanceCounts


def suite(name: str = "s", count: int = 6, turns: int = 1) -> Suite:
    items = tuple(Item(suite=name, id=str(i), turns=("q",) * turns) for i in range(count))
    return Suite(name=name, source="here", sha256="0", items=items, check=None)


def test_every_combination_is_a_cell_with_a_name_of_its_own():
    config = EvalConfig(concurrency=[1, 4], thinking_budgets=[64, 256], num_samples=[3], repeats=2)
    cells = cells_of(config)
    assert len({cell.name for cell in cells}) == 8
    assert cells[0].name == "greedy c1 b64" and cells[0].is_greedy
    greedy, sampled = cells[0], cells[-1]
    assert (greedy.num_samples, greedy.repeats) == (1, 2) and (sampled.num_samples, sampled.repeats) == (3, 1)
    assert [cell.name for cell in cells_of(EvalConfig())] == ["greedy", "sampled"]
    swept = cells_of(EvalConfig(num_samples=[1, 8]))
    assert [cell.name for cell in swept] == ["greedy", "sampled n1", "sampled n8"]
    warmer = cells_of(EvalConfig(temperature=[0.3, 1.0]))
    assert [(cell.name, cell.temperature) for cell in warmer] == [
        ("greedy", 0.0), ("sampled T0.3", 0.3), ("sampled T1", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"greedy": False, "sampled": False}, "nothing to measure"),
        ({"temperature": [0.0]}, "above 0"),
        ({"temperature": [0.6, 0.6]}, "different numbers"),
        ({"repeats": 0}, "eval.repeats"),
        ({"concurrency": [1, 1]}, "different numbers"),
        ({"concurrency": []}, "at least one"),
        ({"arrival": "poisson"}, "needs --rate"),
        ({"arrival": "poisson", "rate": [-1.0]}, "above 0"),
        ({"arrival": "poisson", "rate": [1.0], "concurrency": [4]}, "open loop has no concurrency"),
        ({"arrival": "gamma:0", "rate": [1.0]}, "positive shape"),
        ({"arrival": "uniform", "rate": [1.0]}, "unknown arrival"),
        ({"arrival": "trace:/nowhere.txt"}, "does not exist"),
        ({"rate": [1.0]}, "drop --rate"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        cells_of(EvalConfig(**settings))


def test_every_arm_gets_every_block_and_first_places_balance():
    cells = cells_of(EvalConfig(repeats=2, sampled=False))
    steps = list(steps_of(cells, [suite("a", 30), suite("b", 20)], ["x", "y", "z"], seed=0))
    assert steps == list(steps_of(cells, [suite("a", 30), suite("b", 20)], ["x", "y", "z"], seed=0))
    assert len(steps) == 100 and all(set(step.arms) == {"x", "y", "z"} for step in steps)
    places = Counter((step.suite, step.block, step.arms[0]) for step in steps) + Counter(
        (step.suite, step.block, step.arms[-1]) for step in steps
    )
    assert set(places.values()) == {2}  # whoever began a block in one repeat ends it in the other
    assert len({step.arms for step in steps}) == 6
    assert [step.block for step in steps[:50]] != sorted(step.block for step in steps[:50])


def test_samples_and_turns_are_counted():
    (cell,) = cells_of(EvalConfig(greedy=False, num_samples=[4], concurrency=[2]))
    steps = list(steps_of([cell], [suite(count=5, turns=2)], ["x", "y"], seed=1))
    assert num_requests(steps) == 2 * 5 * 4 * 2
    assert sorted((t.item.id, t.sample) for s in steps for t in s.tasks) == [
        (str(i), k) for i in range(5) for k in range(4)
    ]


@given(st.floats(0.1, 100), st.floats(0.2, 5), st.integers(2, 50))
def test_offsets_start_at_zero_and_ascend(rate, shape, count):
    times = load.offsets(f"gamma:{shape}", rate, count, "seed")
    assert times[0] == 0 and times == sorted(times) and len(times) == count


def test_arrivals_have_the_rate_and_the_burstiness_that_was_asked_for():
    def gaps(arrival: str) -> list[float]:
        times = load.offsets(arrival, 2.0, 4000, "seed")
        return [b - a for a, b in itertools.pairwise(times)]

    for arrival, variation in (("poisson", 1.0), ("gamma:0.25", 2.0), ("gamma:4", 0.5)):
        found = gaps(arrival)
        assert statistics.fmean(found) == pytest.approx(0.5, rel=0.1)
        assert statistics.stdev(found) / statistics.fmean(found) == pytest.approx(variation, rel=0.15)
    assert load.offsets("closed", None, 5, "seed") is None


def test_a_trace_is_replayed_repeated_and_stretched(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 100}\n{"timestamp": 104}\n{"timestamp": 102}\n')
    assert load.offsets(f"trace:{path}", None, 5, "") == [0, 2, 4, 6, 8]
    assert load.offsets(f"trace:{path}", 1.0, 3, "") == [0, 1, 2]
    path.write_text('{"timestamp": 1}\n{"when": 2}\n')
    with pytest.raises(ValueError, match="line 2: no time"):
        load.trace_offsets(path)


def block(number: int) -> BlockRun:
    result = RequestResult(ttft_sec=0.5, token_ids=[1, 2], drafted_per_step=[3], accepted_per_step=[1])
    record = Record(arm="x", cell="greedy", suite="s", item_id="1", correct=True, result=result)
    counts = AcceptanceCounts()
    counts.record(3, 1)
    return BlockRun(
        arm="x", cell="greedy", suite="s", repeat=0, block=number, busy_sec=1.5, records=[record], acceptance=counts
    )


def test_a_killed_run_resumes_from_whole_lines(tmp_path):
    journal = Journal(tmp_path, "plan")
    for number in range(3):
        journal.add(block(number))
    journal.close()
    with journal.path.open("r+b") as file:  # a kill in the middle of the last line
        file.truncate(journal.path.stat().st_size - 20)
    again = Journal(tmp_path, "plan")
    assert again.runs == [block(0), block(1)]
    assert again.done == {("greedy", 0, 0, "x"), ("greedy", 0, 1, "x")}
    again.add(block(2))
    again.close()
    assert len(Journal(tmp_path, "plan").runs) == 3


def test_another_plan_is_refused_and_a_finished_one_leaves_nothing(tmp_path):
    Journal(tmp_path, "abandoned before anything was measured").close()
    journal = Journal(tmp_path, "plan")
    journal.add(block(0))
    journal.close()
    with pytest.raises(ValueError, match="interrupted run with other settings"):
        Journal(tmp_path, "other")
    finished = Journal(tmp_path, "plan")
    finished.close()
    finished.remove()
    assert list(tmp_path.iterdir()) == []
