"""The sequential test after a swap: it neither overlooks a worse head nor chases a good one away."""

from __future__ import annotations

import random

import pytest

from serving.draft_rates import DraftRates
from serving.head_watch import KEPT, LEAST_DRAFTS, MAX_DRAFTS, WINDOW, WORSE, HeadWatch

DRAFTS_PER_REQUEST = 25
OLD = [0.7, 0.6, 0.5]
NOISE = [0.01, 0.0, 0.0]


def accepted(rates, width: int, rng: random.Random) -> int:
    count = 0
    while count < width and rng.random() < rates[count]:
        count += 1
    return count


def seen(rates, num_drafts: int, seed: int = 0, width: int = 3) -> DraftRates:
    counts = DraftRates(3, WINDOW)
    rng = random.Random(seed)
    for _ in range(num_drafts):
        counts.record(width, accepted(rates, width, rng))
    return counts


def watched(rates, old: DraftRates, seed: int = 1, widths=(3,), num_drafts: int = MAX_DRAFTS) -> HeadWatch:
    watch, rng = HeadWatch(old), random.Random(seed)
    for i in range(num_drafts):
        if watch.verdict is not None:
            break
        width = widths[i % len(widths)]
        watch.observe(f"new {i // DRAFTS_PER_REQUEST}", width, accepted(rates, width, rng))
    return watch


def verdicts(rates, num_old: int, **options) -> list[str | None]:
    return [watched(rates, seen(OLD, num_old, seed), seed + 100, **options).verdict for seed in range(40)]


def test_an_equal_and_a_better_head_stay():
    assert verdicts(OLD, 1000).count(KEPT) == 40
    assert verdicts([0.8, 0.7, 0.6], 1000).count(KEPT) == 40


def test_a_head_that_lost_a_quarter_of_each_rate_goes():
    assert verdicts([0.75 * rate for rate in OLD], 1000).count(WORSE) >= 38


def test_noise_goes_within_some_requests_and_the_reason_has_both_lengths():
    watch = watched(NOISE, seen(OLD, 300))
    assert watch.verdict == WORSE and watch.new.num_drafts <= 150
    assert watch.reason is not None and watch.reason.startswith("the acceptance length fell from 2.")
    assert "to 1.0" in watch.reason and watch.reason.endswith(f"in {round(watch.new.num_drafts)} drafts")


def test_drafts_of_other_widths_than_the_old_heads_are_no_evidence_against_it():
    """A policy that drafts fewer tokens shortens what is accepted, not the head's rates."""
    assert verdicts(OLD, 1000, widths=(1, 1, 2)).count(KEPT) == 40
    assert verdicts([0.5 * rate for rate in OLD], 1000, widths=(1, 1, 2)).count(WORSE) == 40


def test_requests_from_before_do_not_count():
    watch = HeadWatch(seen(OLD, 1000), stale={"old"})
    for _ in range(1000):
        watch.observe("old", 3, 0)
    assert watch.verdict is None and watch.new.num_drafts == 0
    for i in range(200):
        watch.observe(f"new {i // 40}", 3, 0)
    assert watch.verdict == WORSE


def test_one_request_alone_proves_nothing_and_neither_do_a_few_drafts():
    watch = HeadWatch(seen([1.0, 1.0, 1.0], 1000))
    for _ in range(500):
        watch.observe("odd", 3, 0)
    assert watch.verdict is None
    watch = HeadWatch(seen([1.0, 1.0, 1.0], 1000))
    for i in range(LEAST_DRAFTS - 1):
        watch.observe(f"new {i}", 3, 0)
    assert watch.verdict is None
    watch.observe("new", 3, 0)
    assert watch.verdict == WORSE


@pytest.mark.parametrize("old", [DraftRates(3, WINDOW), seen(OLD, 2), seen(NOISE, 1000), DraftRates(0)])
def test_an_old_head_that_was_not_seen_or_guessed_nothing_is_not_missed(old):
    watch = HeadWatch(old)
    assert watch.verdict == KEPT and watch.reason is not None and "nothing to lose" in watch.reason


def test_few_drafts_of_the_old_head_make_its_loss_harder_to_prove():
    slightly_worse = [0.85 * rate for rate in OLD]
    assert verdicts(slightly_worse, 60).count(WORSE) < verdicts(slightly_worse, 1000).count(WORSE)
    assert verdicts(OLD, 60).count(WORSE) == 0


@pytest.mark.parametrize(("num_accepted", "verdict"), [(0, WORSE), (3, KEPT)])
def test_a_watch_ends_also_where_one_request_drafts_alone(num_accepted, verdict):
    watch = HeadWatch(seen(OLD, 1000))
    for _ in range(MAX_DRAFTS + 10):
        watch.observe("endless", 3, num_accepted)
    assert watch.verdict == verdict and watch.new.num_drafts == MAX_DRAFTS, "nothing counts after the verdict"


def test_full_length_is_that_of_full_drafts():
    counts = DraftRates(2)
    counts.record(2, 2)
    counts.record(1, 0)
    assert counts.full_length == 1 + 0.5 + 0.5
