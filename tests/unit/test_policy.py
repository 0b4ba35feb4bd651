"""The controller in a simulated engine whose truth is known: how far behind the best fixed K does it stay?"""

from __future__ import annotations

import itertools
import random
import statistics
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.policy import Policy
from serving.policy_settings import PolicySettings
from tests.simulated_engine import (
    BAD,
    GOOD,
    Disturbed,
    Engine,
    K,
    best_goodput,
    dear_first_step,
    expected,
    step_sec,
)


@pytest.mark.parametrize("num_slow_steps", range(60, 140, 8))
def test_what_was_timed_while_the_machine_was_slow_holds_no_width_down(num_slow_steps):
    """Each step of the best K up to then was slow, and each of the one that is tried next is not."""
    engine = Engine(Policy(K, GOOD), noise=0.03)

    def cost(batch: int, width: int) -> float:
        return (0.030 + 0.0012 * width) * (1.25 if len(engine.widths) < num_slow_steps else 1.0)

    engine.cost = cost
    engine.run(num_slow_steps + 1000, 1, GOOD)
    late = engine.widths[num_slow_steps + 200 :]
    assert late.count(K) > len(late) / 2


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("rates", [GOOD, (0.4, 0.3, 0.2), BAD])
def test_never_far_behind_the_best_fixed_width(batch, rates):
    engine = Engine(Policy(K, GOOD)).run(3000, batch, rates)
    assert engine.against_oracle > 0.97
    assert engine.against_plain > 0.97


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("rates", [GOOD, (0.4, 0.3, 0.2), (0.0, 0.0, 0.0)])
def test_a_machine_whose_speed_drifts_does_not_mislead_it(batch, rates):
    """Two K are never timed at the same moment: what lies between them must not count."""

    def cheap(batch: int, width: int) -> float:
        return 0.025 * (1 + 0.06 * width)

    engine = Engine(Policy(K, GOOD), cost=cheap, drift=0.2).run(6000, batch, rates)
    assert engine.against_oracle > 0.97 and engine.against_plain > 0.97


@pytest.mark.parametrize("batches", [(1, 1), (4, 4), (16, 16), (9, 16), (17, 32)])
def test_on_a_machine_that_is_slow_half_of_the_time_it_is_near_the_best(batches):
    """400 steps at one load, or in turn at two that share their times; half of it was met before."""
    shares: list[float] = []
    for seed, rates in itertools.product(range(4), [(0.8, 0.75, 0.7), GOOD, (0.45, 0.4, 0.4), BAD]):
        engine = Engine(Policy(K, GOOD), seed, noise=0.03, cost=Disturbed(seed, dear_first_step))
        load = [batches[step // 70 % 2] for step in range(550)]
        for batch in [(batches[1] + 1) // 2] * 30 + load:
            engine.run(1, batch, rates)

        def goodput(widths: list[int], load=load[150:], rates=rates) -> float:
            seconds = sum(dear_first_step(batch, width) for batch, width in zip(load, widths, strict=True))
            return sum(b * expected(rates, width) for b, width in zip(load, widths, strict=True)) / seconds

        shares.append(goodput(engine.widths[180:]) / max(goodput([width] * 400) for width in range(K + 1)))
    assert statistics.mean(shares) > 0.97


def test_a_machine_that_is_several_times_slower_for_a_while_makes_no_k_look_better():
    seconds, rates = (0.038, 0.044, 0.048, 0.052), (0.74, 0.73, 0.74)
    shares = []
    for seed in range(24):
        rng, slowness = random.Random(seed), [1.0]
        engine = Engine(Policy(K, rates), seed, noise=0.1, cost=lambda _, width, at=slowness: at[0] * seconds[width])
        engine.run(150, 1, rates)
        for _ in range(15):
            slowness[0] = rng.uniform(1, 6)
            engine.run(4, 1, rates)
        slowness[0] = 1.0
        widths = engine.run(100, 1, rates).widths[150:]
        goodput = sum(expected(rates, width) for width in widths) / sum(seconds[width] for width in widths)
        shares.append(goodput / best_goodput(1, rates, lambda _, width: seconds[width]))
    assert statistics.mean(shares) > 0.955


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [1, 4])
def test_what_a_busy_start_measured_is_soon_made_good(batch, seed):
    """While other servers started on the same cores drafts looked too dear; a probe must see that they are not."""
    rates = (0.4, 0.6, 0.6)
    engine = Engine(Policy(K, rates), seed, cost=lambda batch, width: 0.07 + 0.06 * width).run(24, batch, rates)
    assert engine.policy.chosen == 0
    engine.cost = lambda batch, width: 0.027 * (1 + 0.04 * width)
    engine.run(600, batch, rates)
    assert sum(width > 0 for width in engine.widths[-300:]) > 0.9 * 300


def test_greedy_and_sampled_loads_in_turn_each_keep_what_was_measured_of_them():
    """Verifying what is sampled can be so dear that the same head pays for greedy requests alone."""

    def cost(sampled: bool, width: int) -> float:
        return 0.02 * (1 + (0.6 if sampled else 0.05) * width)

    policy, rates, rng = Policy(K, GOOD), (0.5, 0.4, 0.3), random.Random(0)
    late: list[bool] = []
    for turn in range(12):
        sampled = turn % 2 == 1
        before = 0
        for i in range(150):
            width = policy.choose(1, sampled)
            if width:
                accepted = next((n for n in range(width) if rng.random() > rates[n]), width)
                policy.observe_drafts({(width, accepted): 1})
            if before == width:
                policy.observe_step(1, width, cost(sampled, width) * rng.gauss(1, 0.03), sampled)
            before = width
            if turn > 5 and i >= 40:
                late.append((width == 0) == sampled)
    assert sum(late) > 0.85 * len(late)


@pytest.mark.parametrize("gain, best", [(0.0, 0), (0.06, 1)])
def test_a_tie_goes_to_plain_decode(gain, best):
    """Its head rests, which no step's time tells. ``gain``: of drafting one token, by what steps take."""
    policy, chosen = Policy(1, (0.5,)), []
    for i in range(600):
        chosen.append(policy.choose(32))
        if i and chosen[-2]:
            policy.observe_drafts({(1, 1): 16, (1, 0): 16})
        if i and chosen[-2] == chosen[-1]:
            policy.observe_step(32, chosen[-1], 0.06 * (1.5 / (1 + gain) if chosen[-1] else 1.0))
    assert chosen[100:].count(best) > 450


@pytest.mark.parametrize("is_first_sampled", [False, True])
@pytest.mark.parametrize("best", [0, K])
def test_the_first_load_of_the_other_kind_starts_from_what_is_known_of_this_one(is_first_sampled, best):
    """Without a trial of its own."""
    policy = Policy(K, GOOD, PolicySettings(min_probe_steps=512))  # a probe would be a trial, too
    widths = {False: [], True: []}
    for sampled in [is_first_sampled] * 300 + [not is_first_sampled] * 12:
        width = policy.choose(1, sampled)
        if width:
            policy.observe_drafts({(width, width if best else 0): 1})
        if widths[sampled][-1:] == [width]:
            policy.observe_step(1, width, 0.02 * (1 + 0.05 * width), sampled)
        widths[sampled].append(width)
    assert set(widths[not is_first_sampled]) == {best}


def test_a_useless_head_is_given_up_within_five_seconds_and_seldom_asked_again():
    engine = Engine(Policy(K, GOOD)).run(4000, 4, BAD)
    first_plain = next(i for i in range(len(engine.widths)) if set(engine.widths[i : i + 20]) == {0})
    assert sum(step_sec(4, width) for width in engine.widths[:first_plain]) < 5
    assert engine.policy.reason.startswith("K=0 gives "), "what was decided stands there, not what was tried last"
    late = engine.widths[2000:]
    assert sum(width > 0 for width in late) < 0.02 * len(late)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("plain_sec", [0.025, 0.12])
@pytest.mark.parametrize("dearness", [0.15, 0.5, 1.5])
def test_within_five_seconds_a_useless_head_costs_little_at_any_load(width, plain_sec, dearness):
    """``dearness``: what ``width`` drafts add to a plain step. K follows a step late, as it does in a server."""
    rates, prior = (0.03,) * width, (0.75, 0.7, 0.65, 0.6, 0.6)

    def true_goodput(k: int) -> float:
        return expected(rates, k) / (1 + dearness * k / width)

    best = max(true_goodput(k) for k in range(width + 1))
    late = 0  # few drafts, of which one was accepted by chance
    for batch, seed in itertools.product((1, 2, 4, 8, 16, 32), range(10)):
        policy, rng = Policy(width, prior), random.Random(seed)
        passed_sec, verified = 0.0, 0
        while passed_sec < 5:
            drafted = policy.choose(batch)
            seconds = plain_sec * (1 + dearness * (0.6 * verified + 0.4 * drafted) / width) * rng.gauss(1, 0.05)
            for _ in range(batch if verified else 0):
                policy.observe_drafts({(verified, int(rng.random() < rates[0])): 1})
            if verified == drafted:
                policy.observe_step(batch, drafted, seconds)
            passed_sec, verified = passed_sec + seconds, drafted
        late += true_goodput(policy.chosen) < 0.93 * best
    assert late <= 2


@pytest.mark.parametrize("slow", [1.5, 3, 10])
@pytest.mark.parametrize("slow_width", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_first_trial_on_a_cold_machine_is_soon_corrected(batch, slow_width, slow):
    """The first steps of a K take ``slow`` times as long, and the first prompts are of another kind."""
    left = {slow_width: 8}

    def cold(batch: int, width: int) -> float:
        left[width] = left.get(width, 0) - 1
        return step_sec(batch, width) * (slow if left[width] >= 0 else 1)

    engine = Engine(Policy(K, GOOD), cost=cold)
    engine.run(30, batch, BAD).run(400, batch, GOOD)
    engine.tokens = engine.oracle_tokens = 0.0
    engine.cost = step_sec
    assert engine.run(600, batch, GOOD).against_oracle > 0.94, engine.policy.reason


def test_what_makes_only_wide_drafts_dearer_is_noticed_soon():
    """As when requests are sampled from now on: the served K slows down, and the others must not be thought to."""
    rates = (0.8, 0.8, 0.8)
    engine = Engine(Policy(K, GOOD)).run(2500, 1, rates)
    assert engine.policy.chosen == 3
    engine.cost = lambda batch, width: 0.02 * (1 + width)
    engine.run(100, 1, rates)
    engine.tokens = engine.oracle_tokens = 0.0
    assert engine.run(300, 1, rates).against_oracle > 0.95, engine.policy.reason


def test_a_head_that_turns_bad_and_good_again_comes_back():
    engine = Engine(Policy(K, GOOD)).run(800, 2, GOOD)
    assert engine.widths[-1] > 0
    engine.run(800, 2, BAD)
    assert engine.widths[-200:].count(0) > 180
    engine.run(1500, 2, GOOD)
    assert engine.widths[-100:].count(0) == 0
    assert engine.against_oracle > 0.93


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_however_long_it_was_bad_a_head_comes_back_soon(batch):
    engine = Engine(Policy(K, GOOD), noise=0.0).run(500, batch, GOOD).run(4000, batch, BAD)
    tokens, plain, begun = engine.tokens, engine.plain_tokens, len(engine.widths) + 4000
    engine.run(4000, batch, BAD)
    assert (engine.tokens - tokens) / (engine.plain_tokens - plain) > 0.98, "asking in vain costs next to nothing"
    engine.run(1500, batch, (0.9, 0.9, 0.9))
    back = next(i for i in range(1500) if min(engine.widths[begun + i : begun + i + 40]) > 0)
    assert back < 800, back


def test_high_acceptance_does_not_keep_a_losing_speculation_alive():
    def dear(batch: int, width: int) -> float:
        return 0.02 * (1 + 1.5 * width)

    engine = Engine(Policy(K, GOOD), cost=dear).run(2000, 8, (0.9, 0.9, 0.9))
    assert engine.widths[-500:].count(0) > 480


def test_a_load_that_rises_and_falls_is_followed():
    engine = Engine(Policy(K, GOOD))
    for batch in (1, 4, 16, 32, 16, 4, 1):
        engine.run(600, batch, (0.55, 0.5, 0.45))
    assert engine.against_oracle > 0.96
    both = Engine(Policy(K, GOOD))
    for batch, rates in ((1, GOOD), (32, BAD), (4, GOOD), (32, GOOD), (1, BAD)):
        both.run(800, batch, rates)
    assert both.against_oracle > 0.93


def test_noise_does_not_make_it_flutter():
    engine = Engine(Policy(K, GOOD), noise=0.25).run(4000, 4, (0.5, 0.4, 0.3))
    changes = sum(a != b for a, b in zip(engine.widths, engine.widths[1:], strict=False))
    assert changes < 0.05 * len(engine.widths) and engine.against_oracle > 0.93


def test_the_first_probe_comes_no_sooner_than_its_time_after_speculation_has_ended():
    engine = Engine(Policy(K, GOOD)).run(900, 2, GOOD)
    begun = len(engine.widths)
    engine.run(400, 2, BAD)
    lengths = [len(list(group)) for width, group in groupby(engine.widths[begun:]) if width == 0]
    served = next(length for length in lengths if length > engine.policy.settings.trial_steps)  # not a mere trial
    assert served >= engine.policy.settings.min_probe_steps - 1


def test_off_and_fixed_are_obeyed():
    policy = Policy(K)
    policy.mode = "off"
    assert {policy.choose(1) for _ in range(50)} == {0}
    policy.mode, policy.fixed = "fixed", 2
    assert {policy.choose(1) for _ in range(50)} == {2}


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3), st.floats(1e-4, 1.0)), max_size=100))
def test_whatever_is_observed_the_choice_is_a_width(steps):
    policy = Policy(K, settings=PolicySettings(dwell_steps=1, trial_steps=2, min_probe_steps=3))
    for batch, width, seconds in steps:
        policy.observe_step(batch, width, seconds)
        policy.observe_drafts({(width, width // 2): 1})
        assert 0 <= policy.choose(batch) <= K


def test_a_probe_of_a_hopeless_head_is_short():
    engine = Engine(Policy(K, GOOD), cost=lambda batch, width: 0.02 * (1 + 0.5 * width)).run(2000, 1, BAD)
    runs = [len(list(group)) for width, group in groupby(engine.widths[100:]) if width]
    assert runs and max(runs) <= 14  # 24 drafts where it is not so clear


def test_a_machine_that_pauses_now_and_then_does_not_mislead_it():
    pauses = random.Random(5)

    def pausing(batch: int, width: int) -> float:
        return step_sec(batch, width) * (10 if pauses.random() < 0.08 else 1)

    engine = Engine(Policy(K, GOOD), cost=pausing)
    for batch in (1, 2, 4):
        engine.run(1500, batch, GOOD)
    assert engine.widths.count(0) < 0.03 * len(engine.widths)


def test_where_no_step_can_be_timed_trials_become_rare():
    """Each step also reads a prompt, or some request has a width of its own."""
    policy = Policy(K, GOOD)
    widths = [policy.choose(8) for _ in range(3000)]
    assert 0 < widths.count(0) < 0.03 * len(widths)
    assert max(len(list(group)) for width, group in groupby(widths) if width == 0) <= 6


def test_where_few_steps_can_be_timed_a_trial_waits_for_them():
    """As at many requests at a time, of which one or another is always new."""
    policy, rng, verified = Policy(K, GOOD), random.Random(0), 0
    trials: list[list[bool]] = []  # of each: whether its steps were timed
    was_served = True
    for _ in range(4000):
        width = policy.choose(8)
        is_timed = verified == width and rng.random() < 0.3
        if verified:
            policy.observe_drafts({(verified, min(verified, 2)): 8})
        if is_timed:
            policy.observe_step(8, width, step_sec(8, width) * rng.gauss(1, 0.05))
        if policy.reason.endswith("again") and width != policy.width:
            trials += [[]] if was_served else []
            trials[-1].append(is_timed)
        was_served, verified = width == policy.width, width
    assert len(trials) > 15
    assert all(sum(trial) == 2 or len(trial) >= 8 for trial in trials[:-1])
    assert statistics.mean(sum(trial) for trial in trials) > 1.5


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_most_probes_draft_one_token_and_so_speculation_is_soon_back(batch):
    policy = Policy(K, GOOD)
    engine = Engine(policy, cost=lambda batch, width: 0.04 * (1 + 0.18 * width)).run(600, batch, BAD)
    assert policy.chosen == 0
    engine.widths.clear()
    engine.run(1500, batch, BAD)
    probes = [width for width, _ in groupby(engine.widths) if width]
    assert 2 * probes.count(K) < probes.count(1) and probes.count(K) > 0
    assert engine.widths.count(0) > 0.94 * len(engine.widths)
    engine.widths.clear()
    engine.run(300, batch, GOOD)
    assert engine.widths[-100:].count(0) < 10, policy.reason


def test_a_batch_size_that_cannot_be_timed_is_judged_by_the_nearest_that_was():
    engine = Engine(Policy(K, GOOD), cost=lambda batch, width: 0.02 * (1 + width)).run(600, 4, BAD)
    policy = engine.policy
    assert policy.chosen == 0
    widths = [policy.choose(16) for _ in range(1000)]
    assert widths.count(0) > 0.95 * len(widths)


stretches = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(0, 0.95), st.floats(0.0, 1.5)), min_size=1, max_size=4
)


@settings(max_examples=8)
@given(stretches, st.floats(0, 0.2), st.integers(0, 1000))
def test_however_load_acceptance_and_cost_change_it_stays_near_the_best(changes, noise, seed):
    """``changes``: batch size, acceptance, and what K drafts add to a step, for 2,000 steps each.

    Drafts that were useless and dear and are perfect and free from one step to the next are found by a probe, whose
    turn may come hundreds of steps later.
    """
    engine = Engine(Policy(K, GOOD), seed, noise)
    for batch, rate, dearness in changes:
        engine.cost = lambda batch, width, dearness=dearness: 0.02 * (1 + dearness * width / K)
        engine.run(2000, batch, (rate,) * K)
    assert engine.against_oracle > 0.75 and engine.against_plain > 0.9
