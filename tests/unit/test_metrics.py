"""The formulas, against figures worked out by hand and against what must hold for any counts."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.metrics import AcceptanceCounts, bootstrap_ci95, speedup, tpot_sec

drafts = st.lists(
    st.integers(0, 6).flatmap(lambda width: st.tuples(st.just(width), st.integers(0, width))), max_size=40
)


def counted(rounds) -> AcceptanceCounts:
    counts = AcceptanceCounts()
    for num_drafted, num_accepted in rounds:
        counts.record(num_drafted, num_accepted)
    return counts


def test_golden_rates_give_length_and_rate():
    # 10,000 drafts at K=3 with per-position rates 0.3629, 0.1031, 0.0235.
    counts = counted([(3, 3)] * 235 + [(3, 2)] * (1031 - 235) + [(3, 1)] * (3629 - 1031) + [(3, 0)] * (10_000 - 3629))
    assert counts.per_position_rates == [0.3629, 0.1031, 0.0235]
    assert counts.acceptance_length == pytest.approx(1.4895, abs=5e-5)
    assert counts.acceptance_rate == pytest.approx(0.1632, abs=5e-5)
    assert counts.conditional_rates == pytest.approx([0.3629, 1031 / 3629, 235 / 1031])


def test_no_drafts_is_none_not_zero():
    counts = AcceptanceCounts()
    assert counts.acceptance_length is None
    assert counts.acceptance_rate is None
    assert counts.per_position_rates == []
    assert counts.conditional_rates == []


def test_drafts_without_tokens_still_gain_the_bonus_token():
    counts = counted([(0, 0)] * 5)
    assert counts.acceptance_length == 1
    assert counts.acceptance_rate is None


def test_per_position_rates_are_unbiased_when_the_width_varies():
    # The second position accepts every time it is drafted; dividing by all drafts would say 0.25.
    counts = counted([(2, 2)] * 25 + [(1, 1)] * 75)
    assert counts.per_position_rates == [1.0, 1.0]


def test_position_never_drafted_in_a_window_is_none():
    before = counted([(3, 3)])
    window = counted([(3, 3), (1, 1)]) - before
    assert window.per_position_rates == [1.0, None, None]


@pytest.mark.parametrize(("num_drafted", "num_accepted"), [(2, 3), (2, -1)])
def test_impossible_draft_is_refused(num_drafted, num_accepted):
    with pytest.raises(ValueError, match="drafted tokens"):
        AcceptanceCounts().record(num_drafted, num_accepted)


@given(drafts, drafts)
def test_union_is_the_same_as_recording_both(first, second):
    both = counted(first) + counted(second)
    assert both == counted(first + second)
    assert both == counted(second) + counted(first)


@given(drafts, drafts)
def test_window_is_what_was_recorded_since(first, second):
    window = counted(first + second) - counted(first)
    expected = counted(second)
    width = len(window.num_drafted_per_pos)
    padding = [0] * (width - len(expected.num_drafted_per_pos))
    assert window.num_drafts == expected.num_drafts
    assert window.acceptance_length == expected.acceptance_length
    assert window.acceptance_rate == expected.acceptance_rate
    assert window.num_drafted_per_pos == expected.num_drafted_per_pos + padding
    assert window.num_accepted_per_pos == expected.num_accepted_per_pos + padding


@given(drafts)
def test_counts_agree_with_each_other(rounds):
    counts = counted(rounds)
    assert sum(counts.num_drafted_per_pos) == counts.num_draft_tokens
    assert sum(counts.num_accepted_per_pos) == counts.num_accepted_tokens
    assert counts.num_accepted_per_pos == sorted(counts.num_accepted_per_pos, reverse=True)
    if rounds:
        assert 1 <= counts.acceptance_length <= 1 + max(width for width, _ in rounds)


def test_tpot_leaves_the_first_token_out():
    assert tpot_sec(e2e_sec=11.0, ttft_sec=1.0, num_output_tokens=101) == pytest.approx(0.1)
    assert tpot_sec(e2e_sec=1.0, ttft_sec=1.0, num_output_tokens=1) is None
    assert tpot_sec(e2e_sec=1.0, ttft_sec=1.0, num_output_tokens=0) is None


def test_speedup_above_one_is_faster():
    assert speedup(plain_tpot_sec=0.03, spec_tpot_sec=0.02) == pytest.approx(1.5)


def test_bootstrap_interval_holds_the_median_and_repeats():
    values = [1.0 + 0.01 * i for i in range(30)]
    interval = bootstrap_ci95(values)
    assert interval is not None
    low, high = interval
    assert values[0] <= low < statistics.median(values) < high <= values[-1]
    assert bootstrap_ci95(values) == interval
    assert bootstrap_ci95(values[:1]) is None
    assert bootstrap_ci95([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_values_that_share_their_moment_are_not_counted_as_independent():
    rng = random.Random(3)
    moments = [rng.gauss(1, 0.1) for _ in range(8)]
    values = [moment + rng.gauss(0, 0.01) for moment in moments for _ in range(6)]
    clusters = [number for number in range(8) for _ in range(6)]
    low, high = bootstrap_ci95(values, statistics.fmean, clusters=clusters)
    naive_low, naive_high = bootstrap_ci95(values, statistics.fmean)
    assert low < naive_low and naive_high < high and high - low > 1.5 * (naive_high - naive_low)
    assert bootstrap_ci95(values, clusters=[0, 1] * 24) is None
    assert bootstrap_ci95(values, clusters=range(48)) == bootstrap_ci95(values)
