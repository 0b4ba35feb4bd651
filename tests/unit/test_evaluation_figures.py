"""Requests to figures: on synthetic timings, whose truth is known."""

from __future__ import annotations

import random

import pytest

from specdec.evaluation.cost import weight_bytes_of
from specdec.evaluation.figures import Prices, arm_figures, comparison
from specdec.evaluation.records import BlockRun, Record, RequestResult
from specdec.evaluation.summary import client_notes, count_errors, lag_notes, timing_notes
from specdec.metrics import AcceptanceCounts


def answer(tpot_sec: float, num_tokens: int = 32, **fields) -> RequestResult:
    return RequestResult(
        ttft_sec=0.1, e2e_sec=0.1 + (num_tokens - 1) * tpot_sec, num_output_tokens=num_tokens, finish_reason="length",
        **fields,
    )  # fmt: skip


def runs(arm: str, slowdown: float = 1.0, seed: int = 0, num_prompts: int = 24, accept=None) -> list[BlockRun]:
    """Noisy TPOTs of about 20 ms, two repeats; ``accept`` gives the accepted tokens of a step of width 3."""
    rng = random.Random(f"{arm}{seed}")
    found = []
    for repeat in range(2):
        for index in range(num_prompts):
            result = answer(0.02 * rng.gauss(1, 0.03) * slowdown)
            if accept is not None:
                result.accepted_per_step = [accept(random.Random(f"{index}/{step}"), rng) for step in range(20)]
                result.drafted_per_step = [3] * 20
            record = Record(arm=arm, cell="greedy", suite="s", item_id=str(index), repeat=repeat, result=result)
            found.append(
                BlockRun(
                    arm=arm, cell="greedy", suite="s", repeat=repeat, block=index, busy_sec=result.e2e_sec,
                    records=[record],
                )
            )  # fmt: skip
    return found


def test_an_a_a_run_shows_no_difference():
    low, high = comparison(runs("a"), runs("b"))["speedup_ci95"]
    assert low < 1 < high and high - low < 0.05


@pytest.mark.parametrize("slowdown", [1.1, 1.2])
def test_a_planted_slowdown_is_seen(slowdown):
    compared = comparison(runs("a"), runs("b", slowdown))
    assert compared["speedup_median"] == pytest.approx(1 / slowdown, rel=0.03)
    assert compared["speedup_ci95"][1] < 1
    assert compared["throughput_ratio"] == pytest.approx(1 / slowdown, rel=0.05)


def test_a_planted_loss_of_drafts_is_seen_and_equal_heads_are_equal():
    def steady(step: random.Random, _: random.Random) -> int:
        return step.choice([0, 1, 1, 2, 3])

    def lossy(step: random.Random, rng: random.Random) -> int:
        return 0 if rng.random() < 0.05 else steady(step, rng)

    same = comparison(runs("a", accept=steady), runs("b", accept=steady))
    assert same["acceptance_ratio_ci95"] == [1.0, 1.0]
    worse = comparison(runs("a", accept=steady), runs("b", accept=lossy))
    assert worse["acceptance_ratio_ci95"][1] < 1
    assert comparison(runs("a"), runs("b"))["acceptance_ratio_mean"] is None


def test_a_noisy_machine_and_too_few_prompts_are_said():
    def cell(baseline: list[BlockRun]) -> dict:
        figures = {"a": arm_figures(baseline, Prices())}
        return {"name": "greedy", "arms": figures, "comparisons": {"b": comparison(baseline, baseline)}}

    assert timing_notes([cell(runs("a"))], "a") == []
    noisy = runs("a", num_prompts=4)
    for run in noisy:
        run.records[0].result.e2e_sec *= 1 + 0.5 * run.repeat
    spread, few = timing_notes([cell(noisy)], "a")
    assert "not quiet" in spread and "only 4 prompts" in few


def test_failed_requests_count_as_errors_and_give_no_timing():
    mine = runs("a", num_prompts=2)
    for run in mine:
        if run.block == 1:
            run.records[0].result.error = "timeout"
            run.records[0].result.clock_jump_sec = 3.0
    figures = arm_figures(mine, Prices(slo_ttft_sec=1.0))
    assert (figures["num_requests"], figures["num_errors"], figures["slo_share"]) == (4, 2, 0.5)
    assert count_errors([record for run in mine for record in run.records]) == {"timeout": 2, "clock_jump": 2}
    assert list(comparison(mine, runs("b", num_prompts=2))["speedup_by_task"]) == ["s/0/0/0"]


def block(*results: RequestResult, busy_sec: float = 2.0, **fields) -> BlockRun:
    records = [Record(arm="a", cell="c", suite="s", item_id=str(i), result=r) for i, r in enumerate(results)]
    return BlockRun(arm="a", cell="c", suite="s", repeat=0, block=0, busy_sec=busy_sec, records=records, **fields)


def test_goodput_and_cost_by_hand():
    fast, slow = answer(0.01, 11), answer(0.05, 21)
    figures = arm_figures([block(fast, slow, num_engine_steps=16)], Prices(price_per_hour=36.0, slo_tpot_sec=0.02))
    assert figures["throughput_tok_per_sec"] == 16 and figures["goodput_tok_per_sec"] == 5.5
    assert figures["slo_share"] == 0.5 and figures["tokens_per_step"] == 2
    assert figures["cost_per_request"] == pytest.approx(0.01)  # 0.02 for two seconds
    assert figures["cost_per_million_tokens"] == pytest.approx(0.02 / 32 * 1e6)
    bare = arm_figures([block(fast)], Prices())
    assert bare["goodput_tok_per_sec"] is None and bare["cost_per_request"] is None


def test_acceptance_by_span_position_and_width():
    # 40 tokens: one from the prompt, then steps of 4, 1, 2, ... tokens
    accepted = [3, 0, 1, *[2] * 10, 1]
    result = answer(0.01, 40, num_think_tokens=6, accepted_per_step=accepted, drafted_per_step=[3] * 14)
    found = arm_figures([block(result)], Prices())["acceptance"]
    assert found["num_drafts"] == 14 and found["num_accepted_tokens"] == 25
    assert found["by_span"]["think"] == {"acceptance_length": 2.5, "num_drafts": 2}  # they start at tokens 1 and 5
    assert found["by_span"]["answer"]["num_drafts"] == 12
    first, second = found["by_output_position"]
    assert (first["start"], first["end"], second["start"]) == (0, 32, 32)
    assert first["num_drafts"] + second["num_drafts"] == 14
    assert found["draft_width_histogram"] == {"0": 0, "3": 14} and found["fallback_share"] == 0


def test_steps_without_a_draft_are_the_tokens_left_over():
    result = answer(0.01, 12, accepted_per_step=[2, 1], drafted_per_step=[3, 1])
    found = arm_figures([block(result)], Prices())["acceptance"]
    assert found["draft_width_histogram"] == {"0": 6, "1": 1, "3": 1} and found["fallback_share"] == 0.75
    assert found["by_output_position"] == []  # nobody knows where the plain steps were
    assert found["by_span"] == {"answer": {"acceptance_length": 2.5, "num_drafts": 2}}  # but there was no thinking
    assert found["per_position_rates"] == [1.0, 1.0, 0.0]


def test_requests_that_always_draft_do_not_speak_for_those_that_seldom_do():
    lucky = answer(0.01, 9, num_think_tokens=4, accepted_per_step=[3, 3], drafted_per_step=[3, 3])
    other = answer(0.01, 9, num_think_tokens=4, accepted_per_step=[0], drafted_per_step=[3])
    found = arm_figures([block(lucky, other)], Prices())["acceptance"]
    assert found["by_span"] == {} and found["by_output_position"] == []
    assert arm_figures([block(lucky)], Prices())["acceptance"]["by_span"]["think"]["num_drafts"] == 1


def test_a_forced_answer_has_a_prompt_step_of_its_own():
    # Tokens 0 to 4 are thinking, in steps of 1 + 3 + 1; the answer's in steps of 1 + 2.
    forced = answer(
        0.01, 8, num_think_tokens=5, accepted_per_step=[2, 0, 1], drafted_per_step=[3] * 3, forced_from=[2, 5]
    )  # fmt: skip
    found = arm_figures([block(forced)], Prices())["acceptance"]
    assert found["fallback_share"] == 0 and found["by_span"] == {
        "think": {"acceptance_length": 2.0, "num_drafts": 2}, "answer": {"acceptance_length": 2.0, "num_drafts": 1},
    }  # fmt: skip


def test_requests_that_never_drafted_are_plain_steps_too():
    drafted = answer(0.01, 7, accepted_per_step=[2, 2], drafted_per_step=[3, 3])
    found = arm_figures([block(drafted, answer(0.01, 7))], Prices())["acceptance"]
    assert found["draft_width_histogram"] == {"0": 6, "3": 2} and found["fallback_share"] == 0.75
    # Only its counters tell a server that fell back everywhere from one that can't speculate.
    idle = AcceptanceCounts(num_drafted_per_pos=[0, 0, 0], num_accepted_per_pos=[0, 0, 0])
    found = arm_figures([block(answer(0.01, 7), acceptance=idle)], Prices())["acceptance"]
    assert found["fallback_share"] == 1.0 and found["acceptance_length"] is None
    # Drafts that the requests do not tell of leave the widths unknown.
    counted = AcceptanceCounts(num_drafts=2, num_draft_tokens=6, num_accepted_tokens=4)
    assert arm_figures([block(answer(0.01, 7), acceptance=counted)], Prices())["acceptance"]["fallback_share"] is None


def test_conditional_rates_of_a_varying_width_leave_out_drafts_that_ended_before():
    steps = answer(0.01, 7, accepted_per_step=[2, 1, 0], drafted_per_step=[3, 1, 1])
    found = arm_figures([block(steps)], Prices())["acceptance"]
    assert found["conditional_rates"] == [pytest.approx(2 / 3), 1.0, 0.0]
    assert found["per_position_rates"] == [pytest.approx(2 / 3), 1.0, 0.0]


def test_a_client_that_is_the_bottleneck_says_so():
    def notes(**measured) -> list[str]:
        result = answer(0.01, 11, chunk_gaps_sec=[0.02] * 10)
        figures = arm_figures([block(result, **measured), block(result)], Prices())
        cells = [{"name": "greedy c64", "arms": {"a": figures}, "comparisons": {}}]
        return [*client_notes(cells), *lag_notes(cells)]

    assert notes(client_cpu_sec=0.1, client_lags_sec=[0.001] * 19 + [0.2]) == []
    (busy,) = notes(client_cpu_sec=3.0)
    assert busy.startswith("greedy c64: the client itself used 75% of a core while a was measured")
    (late,) = notes(client_lags_sec=[0.001] * 5 + [0.03] * 5)
    assert "woke 30 ms late or more" in late and "20 ms between chunks" in late


def test_counters_win_and_are_only_summed_when_every_block_has_them():
    counts = AcceptanceCounts(
        num_drafts=10, num_draft_tokens=30, num_accepted_tokens=15, num_drafted_per_pos=[10, 10, 10],
        num_accepted_per_pos=[8, 5, 2],
    )  # fmt: skip
    one = answer(0.01, 4, accepted_per_step=[2], drafted_per_step=[3])
    both = arm_figures([block(one, acceptance=counts), block(one, acceptance=counts)], Prices())["acceptance"]
    assert both["acceptance_length"] == 2.5 and both["per_position_rates"] == [0.8, 0.5, 0.2]
    half = arm_figures([block(one, acceptance=counts), block(one)], Prices())["acceptance"]
    assert half["num_drafts"] == 2 and half["acceptance_length"] == 3.0
    assert arm_figures([block(answer(0.01))], Prices())["acceptance"] is None


def test_weights_held_in_another_dtype_take_other_memory(tmp_path):
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 6)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 99)
    assert weight_bytes_of(tmp_path, "bfloat16", "float32") == 32
    assert weight_bytes_of(tmp_path, "bfloat16", "bfloat16") == 16
