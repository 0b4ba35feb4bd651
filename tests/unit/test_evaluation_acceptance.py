"""Counters to rates, prompts from files: everything about acceptance that needs no server."""

from __future__ import annotations

import pytest

from specdec.evaluation import acceptance
from specdec.metrics import AcceptanceCounts, first_divergence, percentile

PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="a, b"} 600.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a, b"} 400.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="a, b"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 3e+03
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 489.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 362.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 103.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 24.0
"""


def test_counters_are_summed_over_labels_and_give_rates():
    counts, note = acceptance.window(AcceptanceCounts(), acceptance.parse_acceptance(PAGE))
    assert note is None
    assert (counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens) == (1000, 3000, 489)
    assert counts.acceptance_length == pytest.approx(1.489)
    assert counts.per_position_rates == pytest.approx([0.362, 0.103, 0.024])
    assert counts.conditional_rates == pytest.approx([0.362, 103 / 362, 24 / 103])


@pytest.mark.parametrize("name", ["drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos"])
def test_a_missing_counter_is_named_never_zero(name):
    full = f"vllm:spec_decode_num_{name}_total"
    page = "\n".join(line for line in PAGE.splitlines() if not line.startswith(full + "{"))
    with pytest.raises(ValueError, match=full):
        acceptance.parse_acceptance(page)


def test_variable_width_gives_no_per_position_rates():
    page = PAGE.replace("3e+03", "2.9e+03")
    counts, note = acceptance.window(AcceptanceCounts(), acceptance.parse_acceptance(page))
    _, other = acceptance.window(AcceptanceCounts(), acceptance.parse_acceptance(PAGE.replace("3e+03", "2.8e+03")))
    assert note == other, "one note, however many blocks say it"
    assert counts.per_position_rates == [] and "not every draft had" in note
    assert counts.acceptance_length == pytest.approx(1.489)


def test_a_restarted_server_is_noticed():
    with pytest.raises(ValueError, match="restarted"):
        acceptance.window(acceptance.parse_acceptance(PAGE), acceptance.parse_acceptance(PAGE.replace("600.0", "3.0")))


def test_trained_acceptance_needs_every_prompt_and_clips_to_the_served_width():
    by_prompt = {"a": [3, 1], "b": [0, 2]}
    counts, note = acceptance.trained_acceptance(by_prompt, ["a", "b"], 3, 3)
    assert note is None and counts.acceptance_length == pytest.approx(1 + 6 / 4)
    narrower, _ = acceptance.trained_acceptance(by_prompt, ["a", "b"], 3, 2)
    assert narrower.acceptance_length == pytest.approx(1 + 5 / 4)
    assert acceptance.trained_acceptance(by_prompt, ["a", "c"], 3, 3)[0] is None
    assert "K=4" in acceptance.trained_acceptance(by_prompt, ["a"], 3, 4)[1]


def test_engine_steps_are_a_difference_of_two_pages():
    def page(count: int) -> str:
        return f'vllm:iteration_tokens_total_count{{engine="0"}} {count}.0\nvllm:iteration_tokens_total_sum 7.0\n'

    assert acceptance.engine_steps(page(10), page(52)) == 42
    assert acceptance.engine_steps(page(52), page(10)) is None  # restarted
    assert acceptance.engine_steps("", page(10)) is None


def test_first_divergence_and_percentile():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert percentile([], 50) is None and percentile([1.0, 2.0], 50) == 1.5 and percentile([3.0], 99) == 3.0
