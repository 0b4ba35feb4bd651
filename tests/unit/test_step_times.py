"""What the policy knows of step times."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from serving.step_times import DRAFTING, LENT_DOUBT, UNKNOWN_UNCERTAINTY, StepTimes, bucket


def test_times_between_two_widths_lie_on_a_line_and_a_pause_is_no_step():
    times = StepTimes()
    for _ in range(20):
        times.observe(4, 0, 0.02)
        times.observe(4, 3, 0.05)
    assert times.estimate(4, 1) == pytest.approx(0.03) and times.estimate(4, 4) is None
    assert times.estimate(8, 0) is None
    times.observe(4, 0, 0.4)
    assert times.estimates(4, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05], rel=0.02)
    times.observe(4, 0, 0.0)  # nor is one that took no time
    assert times.num_observed(4, 0) == 21


def test_a_slower_machine_is_slower_for_every_width_and_tells_nothing_of_one_beside_another():
    times = StepTimes()
    for _ in range(20):
        times.observe(4, 0, 0.02)
        times.observe(4, 3, 0.05)
    assert times.moved(4, 3) == pytest.approx(1.0)
    for _ in range(30):
        times.observe(4, 0, 0.026)
    plain, *_, widest = times.estimates(4, 3)
    assert plain == pytest.approx(0.026, rel=0.02) and widest / plain == pytest.approx(2.5, rel=0.02)
    assert times.moved(4, 3) == pytest.approx(1.3, rel=0.03) and times.moved(4, 0) == 1.0
    certain = times.uncertainty(4, 3, 0)
    times.doubt(4, 3)
    assert times.uncertainty(4, 3, 0) > 1.3 * certain
    for _ in range(3):
        times.observe(4, 3, 0.08)
    assert times.estimate(4, 3) == pytest.approx(0.08, rel=0.05), "what was doubted is soon learned anew"


def test_a_step_out_of_all_proportion_says_little_of_its_width():
    """What takes four times as long, or a quarter, is the machine; how the widths compare is known to some 4 %."""
    for factor in (0.25, 4.0):
        times = StepTimes()
        for _ in range(20):
            times.observe(4, 0, 0.02)
            times.observe(4, 3, 0.05)
        times.were_others()
        for _ in range(20):
            times.observe(4, 0, 0.02)
        times.observe(4, 3, 0.05 * factor)
        plain, *_, wide = times.estimates(4, 3)
        assert wide / plain == pytest.approx(2.5, rel=0.05)


def test_two_widths_are_told_apart_on_a_machine_whose_speed_wanders():
    """Now and then three steps of the wide one: its median against the other's tells far less."""
    misses: list[float] = []
    of_medians: list[float] = []
    for seed in range(40):
        rng, times, slowness = random.Random(seed), StepTimes(), 0.0
        seen: dict[int, list[float]] = {0: [], 3: []}
        for number in range(240):
            width = 3 if number % 24 < 3 else 0
            slowness = 0.93 * slowness + rng.gauss(0, 0.07)
            seconds = (0.03 if width else 0.02) * math.exp(slowness + rng.gauss(0, 0.05))
            times.observe(4, width, seconds)
            seen[width].append(seconds)
        plain, *_, wide = times.estimates(4, 3)
        misses.append(abs(math.log(wide / plain / 1.5)))
        of_medians.append(abs(math.log(statistics.median(seen[3]) / statistics.median(seen[0]) / 1.5)))
    assert statistics.mean(misses) < 0.7 * statistics.mean(of_medians)
    assert statistics.mean(misses) < 0.03


def test_a_width_is_known_the_better_the_more_it_was_timed_and_the_worse_the_longer_ago():
    times = StepTimes()
    rng = random.Random(0)
    for width in (0, 3, 0, 0, 3, 0):
        times.observe(4, width, 0.02 * rng.gauss(1, 0.1))
    few = times.uncertainty(4, 3, 0)
    for _ in range(30):
        for width in (0, 3, 3, 0):
            times.observe(4, width, 0.02 * rng.gauss(1, 0.1))
    many = times.uncertainty(4, 3, 0)
    for _ in range(10_000):
        times.observe(4, 0, 0.02 * rng.gauss(1, 0.1))
    assert few > 2 * many and times.uncertainty(4, 3, 0) > 2 * many
    assert times.uncertainty(8, 3, 0) == UNKNOWN_UNCERTAINTY


def test_what_is_borrowed_moves_with_the_level_and_is_the_less_certain_until_it_has_steps_of_its_own():
    greedy, sampled = StepTimes(), StepTimes()
    assert sampled.uncertainty(8, 3, 0) == UNKNOWN_UNCERTAINTY
    for _ in range(40):
        for width, seconds in enumerate([0.02, 0.03, 0.04, 0.05]):
            for batch, factor in ((8, 1), (16, 2)):
                greedy.observe(batch, width, factor * seconds)
    for batch in (8, 16):
        sampled.borrow(greedy, batch, 3)
    assert sampled.estimates(8, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05], rel=0.01)
    borrowed = sampled.uncertainty(8, 3, 0)
    assert greedy.uncertainty(8, 3, 0) < LENT_DOUBT < borrowed < 2 * LENT_DOUBT
    for _ in range(4):
        sampled.observe(8, 3, 0.06)
    assert sampled.estimates(8, 3) == pytest.approx([0.024, 0.036, 0.048, 0.06], rel=0.05)
    assert sampled.estimates(16, 3) == pytest.approx([0.04, 0.06, 0.08, 0.1], rel=0.01)
    for _ in range(40):
        sampled.observe(8, 0, 0.022)
    for _ in range(40):
        sampled.observe(8, 3, 0.06)
    assert sampled.uncertainty(8, 3, 0) < borrowed
    plain, *_, widest = sampled.estimates(8, 3)
    assert widest / plain == pytest.approx(0.06 / 0.022, rel=0.03), "its own figures win over borrowed ones"


def test_the_level_of_made_up_steps_is_that_of_the_first_served_ones():
    times = StepTimes()
    for width, seconds in enumerate([0.02, 0.03, 0.04, 0.05]):
        for batch in (8, 16):
            for _ in range(6):
                times.observe(batch, width, seconds)
    times.were_others()
    assert times.estimates(8, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05])
    for _ in range(2):
        times.observe(8, 3, 0.06)
    assert times.estimates(8, 3) == pytest.approx([0.024, 0.036, 0.048, 0.06], rel=0.02)
    assert times.estimates(16, 3) == pytest.approx([0.02, 0.03, 0.04, 0.05])


def test_a_narrower_step_is_never_slower_than_a_wider_one():
    times = StepTimes()
    for width, seconds in enumerate([0.02, 0.05, 0.03, 0.04]):
        times.observe(4, width, seconds)
    assert times.estimates(4, 3) == pytest.approx([0.02, 0.03, 0.03, 0.04])
    for width, seconds in enumerate([0.04, 0.05, 0.03, 0.04]):  # nor is drafting free
        times.observe(8, width, seconds)
    assert times.estimates(8, 3) == pytest.approx([0.03 / DRAFTING, 0.03, 0.03, 0.04])


@pytest.mark.parametrize("growth", [0.0, 0.3, 1.0])
def test_batch_sizes_that_share_their_times_each_have_their_own_estimate(growth):
    times = StepTimes()

    def cost(batch: int) -> float:  # a straight line from 8 to 16
        return 0.02 * (1 - growth * (1 - batch / 16))

    times.observe(8, 0, cost(8))
    times.observe(16, 0, cost(16))
    for batch in range(9, 17):
        times.observe(batch, 0, cost(batch))
    assert [times.estimate(batch, 0) for batch in range(9, 17)] == pytest.approx([cost(b) for b in range(9, 17)])


def test_what_shares_its_times_favours_no_width():
    """Of the narrow width fewer sizes are known: what grows with the batch is one figure for all."""
    times = StepTimes()
    for batch, width, seconds in [(8, 0, 0.018), (8, 3, 0.027), (16, 0, 0.02), (16, 1, 0.022), (16, 3, 0.03)]:
        times.observe(batch, width, seconds)
    full, half = (times.estimates(batch, 3) for batch in (16, 9))
    assert [b / a for a, b in zip(full, half, strict=True)] == pytest.approx([half[0] / full[0]] * 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("longer", [{0: 1.08, 1: 1.08}, {0: 1.083, 1: 1.023}])  # alike, and as measured
def test_batches_that_are_not_full_may_take_longer_than_full_ones(seed, longer):
    times, rng, seconds = StepTimes(), random.Random(seed), {0: 0.066, 1: 0.106}
    for turn in range(100):
        width = turn % 2
        for _ in range(8):
            batch = rng.choice((32, 32, 31))
            factor = longer[width] if batch == 31 else 1.0
            times.observe(batch, width, factor * seconds[width] * math.exp(rng.gauss(0, 0.02)))
    full, less = (times.estimates(batch, 1) for batch in (32, 31))
    assert full == pytest.approx([0.066, 0.106], rel=0.03)
    assert less == pytest.approx([longer[k] * full[k] for k in (0, 1)], rel=0.045)
    ratio = seconds[1] / seconds[0]
    assert ratio * longer[1] / longer[0] * 0.992 < full[1] / full[0] < ratio * 1.008, "one of what is served"


def test_where_no_batch_is_full_the_others_tell_k_apart():
    times, rng = StepTimes(), random.Random(0)
    for turn in range(20):
        for _ in range(4):
            width = turn % 2
            times.observe(12, width, 0.04 * (1 + 0.3 * width) * math.exp(rng.gauss(0, 0.02)))
    assert times.estimates(12, 1) == pytest.approx([0.04, 0.052], rel=0.02)


def test_batch_sizes_up_to_a_power_of_two_share_a_bucket():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 32, 33)] == [1, 2, 4, 4, 8, 32, 64]
