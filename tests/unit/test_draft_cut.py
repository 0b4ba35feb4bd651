"""Which draft tokens are verified: what one costs, how many are left, and that the policy counts both."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from serving.control import WHOLE_EVERY
from serving.draft_cut import VERIFYING, WORTH, DraftCut
from serving.kept_policy import VARIABLE
from serving.policy import Policy
from serving.scheduler import POLICY_VARIABLE
from tests.unit.test_scheduler import control, drafted, run, started, step  # noqa: F401 - a fixture

PLAIN_SEC, DRAFT_SEC = 0.02, 0.006  # of a step of eight sequences, and of one more draft token of each


def timed(policy: Policy | None = None, num_steps: int = 12, batch: int = 8) -> Policy:
    """A policy that was told of whole steps of every K."""
    policy = policy or Policy(3)
    for width in (0, 1, 2, 3) * num_steps:
        policy.observe_step(batch, width, PLAIN_SEC + DRAFT_SEC * width)
    return policy


def test_a_draft_token_is_verified_when_it_is_likely_enough_for_what_it_costs():
    assert timed().threshold(8) == pytest.approx(WORTH * DRAFT_SEC / PLAIN_SEC, rel=0.02)


def test_where_few_steps_were_timed_or_k_is_held_all_are_verified():
    assert timed(num_steps=2).threshold(8) is None and timed().threshold(32) is None
    held = timed()
    held.set_mode("fixed", 3)
    assert held.threshold(8) is None


def test_at_a_high_price_drafts_of_sampled_answers_are_verified_whole():
    policy = Policy(3)
    for width in (0, 1, 2, 3) * 12:
        for batch, price in ((8, 0.4), (32, 0.6)):
            policy.observe_step(batch, width, PLAIN_SEC * (1 + price * width), sampled=True)
            policy.observe_step(batch, width, PLAIN_SEC * (1 + price * width))
    assert policy.threshold(8) and policy.threshold(32)
    policy.choose(32, sampled=True)
    assert policy.threshold(8) and policy.threshold(32) is None
    policy.cut.observe(3, {0: 1000})
    assert policy._seconds(32)[1:] == policy.times.estimates(32, 3)[1:], "nothing is taken off there"
    assert policy.times.uncertainty(32, 3, 0) < 0.04, "nor doubted"
    policy.choose(32)
    assert policy.threshold(32)


def test_what_whole_steps_said_of_the_k_is_doubted_once_drafts_are_cut():
    policy = timed()
    before = [policy.times.uncertainty(8, k, 0) for k in (1, 2, 3)]
    assert max(before) < 0.04 and policy.threshold(8)
    assert min(policy.times.uncertainty(8, k, 0) for k in (1, 2, 3)) > 0.09
    now = policy.times.uncertainty(8, 3, 0)
    assert policy.threshold(8) and policy.times.uncertainty(8, 3, 0) == now, "once"


def test_where_a_row_costs_little_all_are_verified():
    policy = Policy(3)
    for width in (0, 1, 2, 3) * 12:
        policy.observe_step(1, width, PLAIN_SEC * (1 + 0.05 * width))
    assert policy.threshold(1) is None and policy.cut.prices[1] == pytest.approx(0.05, rel=0.05)
    policy.cut.observe(3, {0: 1000})  # at another batch size
    assert policy._seconds(1)[1:] == policy.times.estimates(1, 3)[1:]


def test_however_much_is_cut_a_step_that_drafts_takes_no_less_than_a_plain_one():
    policy = timed()
    assert policy.threshold(8)
    policy.cut.observe(3, {0: 10_000})
    policy.cut.prices[8] = 2.0
    assert policy._seconds(8)[1:] == [policy.times.estimate(8, 0)] * 3


def test_the_price_stays_whatever_steps_with_few_drafts_take():
    policy = timed()
    before = policy.threshold(8)
    for _ in range(400):
        policy.observe_step(8, 3, PLAIN_SEC + DRAFT_SEC, num_cut=2.0)
    assert policy.threshold(8) == before


def test_a_step_counts_as_long_as_it_would_have_been_with_what_was_cut():
    policy = timed()
    assert policy.threshold(8)
    whole = policy.times.estimate(8, 3)
    for _ in range(400):
        policy.observe_step(8, 3, PLAIN_SEC + DRAFT_SEC * (3 - VERIFYING * 2.0), num_cut=2.0)
    assert policy.times.estimate(8, 3) == pytest.approx(whole, rel=0.02)
    assert policy.times.estimate(8, 0) == pytest.approx(PLAIN_SEC, rel=0.02)


def test_shares_of_what_is_kept_follow_the_drafts_by_position():
    cut = DraftCut(3)
    assert cut.kept(3) == 3
    for _ in range(400):
        cut.observe(3, {0: 2, 1: 4, 3: 2})
    assert cut.kept(1) == pytest.approx(0.75, abs=0.01) and cut.kept(3) == pytest.approx(1.25, abs=0.02)
    for _ in range(400):
        cut.observe(1, {0: 8})  # the later positions were not asked for
    assert cut.kept(1) == pytest.approx(0, abs=0.01) and cut.kept(3) == pytest.approx(0.5, abs=0.02)


def test_what_is_cut_makes_drafting_pay_where_it_would_not():
    """Every second draft is sure to be accepted, the others are not, and the head knows which: K = 1 whole gives 1.5
    tokens for 1.6 plain steps, cut 1.5 for less than 1.4."""
    rng, policy, chosen = random.Random(1), Policy(1, (0.5,)), []
    plain, more = 0.06, 0.036
    for width in (0, 1) * 12:
        policy.observe_step(32, width, plain + more * width)
    assert policy.threshold(32)
    kept = 0
    for _ in range(600):
        before = chosen[-1] if chosen else 0
        chosen.append(policy.choose(32))
        if before:
            policy.observe_drafts({(1, 1): kept, (1, 0): 32 - kept})
            policy.cut.observe(1, {1: kept, 0: 32 - kept})
        if before == chosen[-1]:
            cut = 1 - kept / 32 if before else 0.0
            seconds = plain + more * before - VERIFYING * more * cut
            policy.observe_step(32, before, seconds * rng.gauss(1, 0.03), num_cut=cut)
        kept = sum(rng.random() < 0.5 for _ in range(32))
    assert chosen[200:].count(1) > 350


def test_prices_are_kept_with_the_times():
    policy, other = timed(), Policy(3)
    assert policy.threshold(8)
    other.restore_times(policy.times_as_json())
    assert other.threshold(8) == policy.threshold(8)
    with pytest.raises(KeyError):
        Policy(3).restore_times({key: value for key, value in policy.times_as_json().items() if key != "prices"})


SURE, UNSURE = [-0.1, -0.2, -0.3], [-0.1, -4.0, -5.0]  # logs of how likely each token and all before it are


def test_the_scheduler_drops_what_is_unlikely_from_where_it_begins(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "auto"}')
    monkeypatch.delenv(VARIABLE, raising=False)
    scheduler = started()
    timed(scheduler.specdec.policy, batch=2)
    assert drafted(scheduler) == {"r0": 3, "r1": 3}, "nothing is known of these drafts"

    def left(**more) -> dict[str, int]:
        names = list(scheduler.requests)
        drafts = SimpleNamespace(
            req_ids=names, draft_token_ids=[[7, 7, 7], [8, 8, 8]], specdec_log_probs=[SURE, UNSURE], **more
        )
        scheduler.update_draft_token_ids(drafts)
        return {name: len(request.spec_token_ids) for name, request in scheduler.requests.items()}

    found = [left() for _ in range(2 * WHOLE_EVERY)]
    assert found.count({"r0": 3, "r1": 1}) == 2 * WHOLE_EVERY - 2
    scheduler.schedule()
    assert not scheduler.specdec._steps[-1].is_cut
    left()
    scheduler.schedule()
    assert scheduler.specdec._steps[-1].is_cut, "also after vLLM's scheduler has been through its own hooks"
    assert found.count({"r0": 3, "r1": 3}) == 2, "now and then all are verified, so that acceptance is seen unchosen"
    scheduler.specdec.set_policy("fixed:3")
    assert left() == {"r0": 3, "r1": 3}
    scheduler.specdec.set_policy("auto")
    scheduler.specdec.pinned = {"r1": 2}
    assert left() == {"r0": 3, "r1": 2}, "who asks for a number gets it"


def cut_step(control, lengths: list[int], prompt: int = 0):  # noqa: F811
    """A step of two sequences with so many drafts each, of the three that were asked for."""
    control.policy.cut.prices[2] = 0.3
    control.cut(["r0", "r1"], [SURE, UNSURE])
    output = step(2, 3, 3, prompt=prompt)
    output.scheduled_spec_decode_tokens = {f"r{i}": [5] * n for i, n in enumerate(lengths) if n}
    output.num_scheduled_tokens = {f"r{i}": 1 + n + prompt for i, n in enumerate(lengths)}
    return output


def request(name: str):
    return SimpleNamespace(request_id=name, prompt_token_ids=[1], output_token_ids=[2])


def test_what_was_cut_counts_as_rejected_for_the_policy_and_not_for_the_monitor(control):  # noqa: F811
    run(control, step(2, 0, 3), 0.02)
    tries = control.policy.acceptance.counts.tries[0]
    control.scheduled(cut_step(control, [3, 0]))
    control.drafted(request("r0"), 3, 3)
    control.now[0] += 0.03
    control.ended(5, lambda _: True)
    assert control.policy.acceptance.counts.tries[0] == pytest.approx(tries + 2, rel=0.01)
    assert control.status()["totals"]["num_drafts"] == 0
    assert control.policy.cut.kept(3) < 3
    control.cut(["r0", "r1"], None)  # a whole step
    control.scheduled(step(2, 3, 3))
    control.drafted(request("r0"), 3, 3)
    control.ended(8, lambda _: True)
    assert control.status()["totals"]["num_drafts"] == 1


def test_a_step_that_reads_a_prompt_too_says_nothing_of_what_was_cut(control):  # noqa: F811
    run(control, step(2, 0, 3), 0.02)
    tries = control.policy.acceptance.counts.tries[0]
    control.scheduled(cut_step(control, [3, 0], prompt=9))
    control.drafted(request("r0"), 3, 3)
    control.ended(5, lambda _: True)
    assert control.policy.acceptance.counts.tries[0] == tries and control.policy.cut.kept(3) == 3
