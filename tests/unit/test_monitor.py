"""Counts that stay right while K changes, spans by tokens, and an alarm that is neither deaf nor nervous."""

from __future__ import annotations

import json
import random

import pytest

from serving.draft_rates import DraftRates
from serving.drift import DriftDetector
from serving.monitor import MAX_HISTORY, Draft, Monitor, SpanTracker, position_bucket


def drafts(rates, num_drafts: int, width: int, seed: int = 0):
    """Accepted counts of a head with these conditional rates."""
    rng = random.Random(seed)
    for _ in range(num_drafts):
        accepted = 0
        while accepted < width and rng.random() < rates[accepted]:
            accepted += 1
        yield accepted


def test_rates_are_not_biased_by_shorter_drafts():
    counts = DraftRates(3)
    counts.record(3, 2)
    counts.record(1, 1, count=2)
    assert counts.per_position_rates == [1.0, 1.0, 0.0]  # accepted / drafts would say 1/3 for the second
    assert counts.conditional_rates == [1.0, 1.0, 0.0]
    assert counts.acceptance_length == 1 + 4 / 3
    assert DraftRates(2).acceptance_length is None and DraftRates(2).conditional_rates == [None, None]


def test_rejected_early_reaches_nothing_later():
    counts = DraftRates(3)
    counts.record(3, 0)
    assert counts.per_position_rates == [0.0, 0.0, 0.0] and counts.conditional_rates == [0.0, None, None]


def test_recent_counts_forget_and_many_at_once_are_as_many_one_by_one():
    one_by_one, at_once = DraftRates(2, 16.0), DraftRates(2, 16.0)
    for accepted, count in ((2, 40), (0, 12)):
        for _ in range(count):
            one_by_one.record(2, accepted)
        at_once.record(2, accepted, count)
    assert at_once.acceptance_length == pytest.approx(one_by_one.acceptance_length)
    assert at_once.conditional_rates == pytest.approx(one_by_one.conditional_rates)
    assert 1.8 < at_once.acceptance_length < 2.0  # of 52 drafts 40 were perfect, but not lately


def test_status_has_every_figure_and_is_json():
    monitor = Monitor(3, [0.6, 0.7, 0.6])
    assert json.loads(json.dumps(monitor.status()))["acceptance_length"] is None
    monitor.observe_drafts(Draft(3, 1, position_bucket(0), "think"), 2, 0.5)
    monitor.observe_drafts(Draft(2, 2, position_bucket(300), "answer"), 1, 0.5)
    monitor.observe_step(3, 3, 0.1, 7, 0.5, lambda batch: 55.0)
    monitor.observe_step(3, 0, 0.3, 3, 0.6, lambda batch: 55.0)
    status = json.loads(json.dumps(monitor.status()))
    assert status["goodput_tok_per_sec"] == pytest.approx(25, rel=0.1)
    assert status["fallback_share"] == pytest.approx(0.75)
    assert status["tokens_per_step"] == pytest.approx(10 / 6, rel=0.1)  # τ would leave the plain step out
    assert status["k_histogram"] == {"0": 1, "3": 1}
    totals = status["totals"]
    assert (totals["num_drafts"], totals["num_draft_tokens"], totals["num_accepted_tokens"]) == (3, 8, 4)
    assert (totals["num_output_tokens"], totals["num_sequence_steps"]) == (10, 6)
    assert totals["drafted_per_position"] == [3, 3, 2] and totals["reached_per_position"] == [3, 3, 0]
    assert totals["accepted_per_position"] == [3, 1, 0]
    assert status["by_span"]["think"]["acceptance_length"] == 2.0
    assert status["by_span"]["think"]["conditional_rates"] == [1.0, 0.0, None]
    assert status["by_output_position"][1]["per_position_rates"] == [1.0, 1.0, None]
    assert [bucket["num_drafts"] for bucket in status["by_output_position"]] == [2, 1, 0, 0, 0]
    assert len(status["history"]) == 1  # one point a second


def test_goodput_stands_against_plain_decode_of_the_same_batch_sizes():
    monitor, asked = Monitor(3), []

    def plain(batch: int) -> float:
        asked.append(batch)
        return 25.0 * batch

    for step in range(40):
        monitor.observe_step(4, 2, 0.1, 16, 0.1 * step, plain)  # 160 tokens/s where plain decode gives 100
    for step in range(40, 60):
        monitor.observe_step(1, 2, 0.1, 4, 0.1 * step, plain)  # 40, 25
        assert monitor.goodput_tok_per_sec / monitor.plain_tok_per_sec == pytest.approx(1.6)
    assert 40 < monitor.goodput_tok_per_sec < 160
    assert len(asked) <= 7  # an estimate is dear: once a second for each size
    last = monitor.status()["history"][-1]
    assert last["goodput_tok_per_sec"] / last["plain_tok_per_sec"] == pytest.approx(1.6, abs=0.001)


def test_plain_speed_that_is_not_known_is_not_made_up():
    monitor = Monitor(3)
    monitor.observe_step(2, 3, 0.1, 8, 0.0, lambda batch: None)
    assert monitor.status()["plain_tok_per_sec"] is None
    for step in range(1, 20):
        monitor.observe_step(4, 3, 0.1, 16, 0.1 * step, {2: None, 4: 100.0}.get)
    assert monitor.status()["plain_tok_per_sec"] == pytest.approx(100.0)


def test_a_server_without_a_head_is_as_fast_as_plain_decode():
    monitor = Monitor(0)
    for step in range(20):
        monitor.observe_step(4, 0, 0.1 + 0.01 * step, 4, float(step), lambda batch: None)
    status = monitor.status()
    assert status["plain_tok_per_sec"] == status["goodput_tok_per_sec"] > 0


def test_history_and_events_are_bounded():
    monitor = Monitor(1)
    for second in range(2 * MAX_HISTORY):
        monitor.observe_step(1, 1, 0.1, 1, float(second), lambda batch: None)
        monitor.event(second, "policy", "K=1")
    status = monitor.status()
    assert len(status["history"]) == MAX_HISTORY and status["history"][-1]["at_sec"] == 2 * MAX_HISTORY - 1
    assert len(status["events"]) == 100


@pytest.mark.parametrize("start,end", [([7], [8]), ([7, 70], [8, 80])])
def test_spans_follow_the_tags(start, end):
    spans = SpanTracker(start, end)
    assert spans.span("a", [1, *start, 2], [5]) == "think"  # the prompt forces the tag
    assert spans.span("a", [1, *start, 2], [5, 6, *end[:1]]) == ("answer" if len(end) == 1 else "think")
    assert spans.span("a", [1, *start, 2], [5, 6, *end, 9]) == "answer"
    assert spans.span("b", [1, 2], [*start, 5]) == "think"
    assert spans.span("c", [1, *start, 3, *end, 2], [5]) == "answer"  # an earlier turn's thinking
    assert set(spans.known) == {"a", "b", "c"}
    spans.forget(["a", "b", "c"])
    assert spans.known == [] and SpanTracker().span("a", [1], [2]) == "answer"


TRAINED = [0.6, 0.7, 0.6]


def alarms(rates, num_drafts: int = 20_000, seed: int = 0) -> list[int]:
    """After how many drafts the alarm began or ended."""
    detector = DriftDetector(TRAINED)
    return [n for n, accepted in enumerate(drafts(rates, num_drafts, 3, seed)) if detector.observe(3, accepted)]


def test_a_head_as_good_as_trained_or_better_raises_no_alarm():
    for seed in range(5):
        assert alarms(TRAINED, seed=seed) == [] and alarms([0.9, 0.9, 0.9], seed=seed) == []
        assert alarms([0.55, 0.65, 0.55], seed=seed) == []  # a little worse is no drift


def test_a_head_that_lost_a_third_raises_it_within_a_thousand_drafts():
    for seed in range(5):
        (begun,) = alarms([0.4, 0.45, 0.4], seed=seed)
        assert begun < 1000


def test_the_alarm_ends_when_acceptance_is_back_and_names_both_figures():
    detector = DriftDetector(TRAINED)
    changes = [detector.observe(3, accepted) for accepted in drafts([0.2, 0.2, 0.2], 2000, 3)]
    assert changes.count(True) == 1
    assert "2.27" in (detector.reason or "")  # 1 + 0.6 + 0.42 + 0.252
    changes = [detector.observe(3, accepted) for accepted in drafts(TRAINED, 3000, 3, seed=1)]
    assert changes.count(True) == 1 and detector.reason is None


@pytest.mark.parametrize("width", [1, 3])
def test_while_the_alarm_lasts_it_says_what_is_accepted_now(width):
    # Where only the first is drafted the others are taken to be as trained.
    length = 1 + 0.3 * (1 + 0.4 * 1.4) if width == 3 else 1 + 0.3 * (1 + 0.7 * 1.6)
    for seed in range(5):
        detector = DriftDetector(TRAINED)
        for accepted in drafts([0.3, 0.4, 0.4], 400, width, seed):
            detector.observe(width, accepted)
        told = float((detector.reason or "").split("about ")[1].split(",")[0])
        assert told == pytest.approx(length, abs=0.15)


def test_without_trained_figures_there_is_nothing_to_drift_from():
    detector = DriftDetector([])
    assert not any(detector.observe(3, 0) for _ in range(1000))
