"""What the policy knows of acceptance and of step times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.estimates import DRAFTING, AcceptanceModel, StepTimes, bucket


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=200))
def test_rates_stay_rates(drafts):
    model = AcceptanceModel([0.5] * 3, window=50.0, prior_weight=8.0)
    for drafted, accepted in drafts:
        model.observe(drafted, min(drafted, accepted))
    assert all(0 <= rate <= 1 for rate in model.conditional_rates)
    lengths = [model.expected_tokens(k) for k in range(4)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] <= 4


def test_times_between_two_widths_lie_on_a_line_and_a_pause_is_no_step():
    times = StepTimes(window=20)
    for _ in range(20):
        times.observe(4, 0, 0.02)
        times.observe(4, 3, 0.05)
    assert times.estimate(4, 1) == pytest.approx(0.03) and times.estimate(4, 4) is None
    assert times.estimate(8, 0) is None
    for _ in range(14):
        times.observe(4, 0, 0.03)
    assert times.estimate(4, 0) == pytest.approx(0.02)
    times.observe(4, 0, 0.03)  # fewer than a quarter are faster
    assert times.estimate(4, 0) == pytest.approx(0.03)


def test_what_is_borrowed_moves_as_far_as_what_is_known_of_its_own_kind_differs():
    greedy, sampled = StepTimes(window=20), StepTimes(window=20)
    for width, seconds in enumerate([0.02, 0.03, 0.04, 0.05]):
        for batch, factor in ((8, 1), (16, 2)):
            greedy.observe(batch, width, factor * seconds)
    for batch in (8, 16):
        sampled.borrow(greedy, batch, 3)
    sampled.observe(8, 3, 0.06)
    assert sampled.estimates(8, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05]), "one step may be any"
    sampled.observe(8, 3, 0.06)
    assert sampled.estimates(8, 3) == pytest.approx([0.024, 0.036, 0.048, 0.06])
    assert sampled.estimates(16, 3) == pytest.approx([0.04, 0.06, 0.08, 0.1])
    for _ in range(2):
        sampled.observe(8, 0, 0.022)
    assert sampled.estimates(8, 3) == pytest.approx([0.022, 0.033, 0.044, 0.06]), "what has its own stays"


def test_the_level_of_made_up_steps_is_that_of_the_first_served_ones():
    times = StepTimes(window=20)
    for width, seconds in enumerate([0.02, 0.03, 0.04, 0.05]):
        for batch in (8, 16):
            for _ in range(6):
                times.observe(batch, width, seconds, is_trial=True)
    times.were_made_up()
    assert times.estimates(8, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05]) and times.num_observed(8, 3) == 2
    for _ in range(2):
        times.observe(8, 3, 0.06)
    assert times.estimates(8, 3) == pytest.approx([0.024, 0.036, 0.048, 0.06])
    assert times.estimates(16, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05])


def test_a_narrower_step_is_never_slower_than_a_wider_one():
    times = StepTimes(window=20)
    for width, seconds in enumerate([0.02, 0.05, 0.03, 0.04]):
        times.observe(4, width, seconds)
    assert times.estimates(4, 3) == pytest.approx([0.02, 0.03, 0.03, 0.04])
    for width, seconds in enumerate([0.04, 0.05, 0.03, 0.04]):  # nor is drafting free
        times.observe(8, width, seconds)
    assert times.estimates(8, 3) == pytest.approx([0.03 / DRAFTING, 0.03, 0.03, 0.04])


@pytest.mark.parametrize("growth", [0.0, 0.3, 1.0])
def test_batch_sizes_that_share_their_times_each_have_their_own_estimate(growth):
    times = StepTimes(window=20)

    def cost(batch: int) -> float:  # a straight line from 8 to 16
        return 0.02 * (1 - growth * (1 - batch / 16))

    times.observe(8, 0, cost(8))
    times.observe(16, 0, cost(16))
    for batch in range(9, 17):
        times.observe(batch, 0, cost(batch))
    assert [times.estimate(batch, 0) for batch in range(9, 17)] == pytest.approx([cost(b) for b in range(9, 17)])


def test_what_shares_its_times_favours_no_width():
    """Of the narrow width fewer sizes are known: what grows with the batch is one figure for all."""
    times = StepTimes(window=20)
    for batch, width, seconds in [(8, 0, 0.018), (8, 3, 0.027), (16, 0, 0.02), (16, 1, 0.022), (16, 3, 0.03)]:
        times.observe(batch, width, seconds)
    full, half = (times.estimates(batch, 3) for batch in (16, 9))
    assert [b / a for a, b in zip(full, half, strict=True)] == pytest.approx([half[0] / full[0]] * 4)


def test_batch_sizes_up_to_a_power_of_two_share_a_bucket():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 32, 33)] == [1, 2, 4, 4, 8, 32, 64]
