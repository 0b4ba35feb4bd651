"""The cost model against figures worked out by hand."""

from __future__ import annotations

import pytest

from specdec.evaluation import cost
from specdec.evaluation.cost import ALWAYS_SLOWER, NEVER_SLOWER, NOT_MONOTONE, STOP_ABOVE, break_even, cost_points

PLAIN_ARM = {"name": "plain", "baseline": True, "num_speculative_tokens": 0, "synthetic": False}
HEAD_ARM = {"name": "head", "baseline": False, "num_speculative_tokens": 3, "synthetic": False}


def figures(tpot=0.020, step=0.025, tau=2.0):
    acceptance = None if tau is None else {"acceptance_length": tau}
    return {"tpot_sec": {"p50": tpot}, "step_sec_p50": step, "acceptance": acceptance}


def cell(concurrency=1, speedup=1.5, **changes):
    return {
        "name": f"greedy c{concurrency}", "temperature": 0.0, "concurrency": concurrency, "arrival": "closed",
        "rate": None, "max_new_tokens": 128, "thinking_budget": None,
        "arms": {"plain": figures(0.020, 0.020, None), "head": figures(0.0125, 0.025, 2.0)},
        "comparisons": {"head": {"speedup_median": speedup}},
        **changes,
    }  # fmt: skip


def test_golden_point():
    (point,) = cost_points([cell(4)], [PLAIN_ARM, HEAD_ARM], bandwidth_bound_step_sec=0.015)
    assert point.pop("predicted_speedup") == pytest.approx(1.6)  # 2 tokens for 25 ms against 20 ms each
    assert point.pop("ceiling_speedup") == pytest.approx(3.2)  # 4 tokens for 25 ms
    assert point.pop("break_even_acceptance_length") == pytest.approx(1.25)
    assert point == {
        "arm": "head", "cell": "greedy c4", "cell_group": "greedy, 128 tokens", "concurrency": 4,
        "max_new_tokens": 128, "temperature": 0.0, "num_speculative_tokens": 3, "acceptance_length": 2.0,
        "plain_step_sec": 0.020, "spec_step_sec": 0.025, "measured_speedup": 1.5,
        "bandwidth_bound_step_sec": 0.015, "synthetic": False,
    }  # fmt: skip


def test_steps_without_a_draft_yield_one_token():
    """As of an n-gram lookup that finds something in a quarter of its steps."""
    head = figures(0.016, 0.025, 3.0)
    head["acceptance"]["fallback_share"] = 0.75
    (point,) = cost_points([cell(arms={"plain": figures(0.020, 0.020, None), "head": head})], [PLAIN_ARM, HEAD_ARM])
    assert point["predicted_speedup"] == pytest.approx(1.5 * 0.8)
    assert point["ceiling_speedup"] == pytest.approx(1.75 * 0.8)


def test_a_synthetic_arm_says_so():
    (point,) = cost_points([cell()], [PLAIN_ARM, {**HEAD_ARM, "synthetic": True}])
    assert point["synthetic"] is True and point["bandwidth_bound_step_sec"] is None


@pytest.mark.parametrize(
    ("plain", "head", "missing", "kept"),
    [
        (figures(None), figures(), {"plain_step_sec", "predicted_speedup", "ceiling_speedup"}, "spec_step_sec"),
        (figures(), figures(step=None), {"spec_step_sec", "break_even_acceptance_length"}, "acceptance_length"),
        (figures(), figures(tau=None), {"acceptance_length", "predicted_speedup"}, "ceiling_speedup"),
        (None, figures(), {"plain_step_sec", "ceiling_speedup", "break_even_acceptance_length"}, "spec_step_sec"),
    ],
)
def test_what_was_not_measured_is_null(plain, head, missing, kept):
    (point,) = cost_points([cell(arms={"plain": plain, "head": head}, comparisons=None)], [PLAIN_ARM, HEAD_ARM])
    assert {name for name in missing if point[name] is None} == missing
    assert point[kept] is not None and point["measured_speedup"] is None


def test_unknown_width_has_no_ceiling_but_a_prediction():
    (point,) = cost_points([cell()], [PLAIN_ARM, {**HEAD_ARM, "num_speculative_tokens": None}])
    assert point["ceiling_speedup"] is None and point["predicted_speedup"] == pytest.approx(1.6)


def test_a_speculating_baseline_gives_no_points():
    assert cost_points([cell()], [{**PLAIN_ARM, "num_speculative_tokens": 2}, HEAD_ARM]) == []
    assert len(cost_points([cell()], [{**PLAIN_ARM, "num_speculative_tokens": None}, HEAD_ARM])) == 1


def test_a_second_plain_arm_and_an_absent_arm_give_no_points():
    second = {**HEAD_ARM, "num_speculative_tokens": 0}
    both_plain = cell(arms={"plain": figures(tau=None), "head": figures(tau=None)})
    assert cost_points([both_plain], [PLAIN_ARM, second]) == []
    assert cost_points([cell(arms={"plain": figures()})], [PLAIN_ARM, HEAD_ARM]) == []


def sweep(*speedups, **changes):
    return cost_points([cell(4**i, s, **changes) for i, s in enumerate(speedups, 1)], [PLAIN_ARM, HEAD_ARM])


def test_the_crossing_is_interpolated_in_logarithms():
    # 1.25 at 4 and 0.8 at 16 are equally far from 1, and 8 is equally far from 4 and 16.
    (row,) = break_even(sweep(1.25, 0.8))
    assert row.pop("concurrency") == pytest.approx(8.0)
    assert row == {"arm": "head", "cell_group": "greedy, 128 tokens", "verdict": STOP_ABOVE}
    # 1.2 at 4, 0.9 at 16: 4 * 4 ** (ln 1.2 / ln (4/3)) = 4 * 4 ** 0.63376
    assert break_even(sweep(1.2, 0.9))[0]["concurrency"] == pytest.approx(9.6297, abs=1e-3)
    assert break_even(sweep(1.0, 0.9))[0]["concurrency"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("speedups", "concurrency", "verdict"),
    [
        ((1.4, 1.0), None, NEVER_SLOWER),
        ((0.9, 0.8), None, ALWAYS_SLOWER),
        ((0.9, 1.1), None, NOT_MONOTONE),
        ((1.3, 0.9, 1.1), None, NOT_MONOTONE),
        ((1.1, 0.9, 1.25, 0.8), 128.0, STOP_ABOVE),  # the last crossing, between 64 and 256
    ],
)
def test_verdicts(speedups, concurrency, verdict):
    (row,) = break_even(sweep(*speedups))
    assert row["verdict"] == verdict
    assert row["concurrency"] == (None if concurrency is None else pytest.approx(concurrency))


@pytest.mark.parametrize(
    ("changes", "cell_group"),
    [
        ({"temperature": 0.6}, "T=0.6, 128 tokens"),
        ({"temperature": None, "thinking_budget": 64}, "sampled, 128 tokens, 64 of thinking"),
        ({"temperature": None, "num_samples": 4}, "sampled, 128 tokens, 4 samples"),
        ({"max_new_tokens": 256}, "greedy, 256 tokens"),
        ({"arrival": "poisson", "rate": 2.5}, "greedy, 128 tokens, poisson at 2.5/s"),
        ({"arrival": "trace:a.csv"}, "greedy, 128 tokens, trace:a.csv"),
    ],
)
def test_only_cells_that_differ_in_concurrency_alone_are_joined(changes, cell_group):
    rows = break_even([*sweep(1.25, 0.8), *sweep(0.9, 0.8, **changes)])
    assert [(row["cell_group"], row["verdict"]) for row in rows] == [
        ("greedy, 128 tokens", STOP_ABOVE), (cell_group, ALWAYS_SLOWER),
    ]  # fmt: skip


def test_one_concurrency_or_no_speedup_shows_no_trend():
    assert break_even(sweep(1.2)) == []
    assert break_even(sweep(1.2, None)) == []
    assert break_even([]) == []


def test_memory_bound():
    # 1 GB of weights and 100 kB for each of 10,000 tokens at 10 GB/s
    assert cost.memory_bound(1e9, 1e5, 10_000, 10e9) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="must be positive"):
        cost.memory_bound(1e9, 1e5, 10_000, 0)


def test_bandwidth_is_the_bytes_of_the_buffer_over_the_best_round(monkeypatch):
    ticks = iter([0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 4.0, 5.0])  # rounds of 0.5, 0.25, 1 and 1 seconds
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    assert cost.measure_bandwidth(2**20) == pytest.approx(2**20 / 0.25)


def test_bandwidth_of_this_machine_is_plausible():
    assert 1e8 < cost.measure_bandwidth(2**24) < 1e13
