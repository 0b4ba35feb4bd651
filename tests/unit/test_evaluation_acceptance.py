"""Counters to rates, prompts from files, the schedule, the figures: everything that needs no server."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from specdec.config import RunConfig, load_config
from specdec.device import Device
from specdec.evaluation import acceptance, arms
from specdec.evaluation.arms import PLAIN, SPEC
from specdec.evaluation.client import RequestResult
from specdec.evaluation.losslessness import BUG, TIE, judge_margin
from specdec.evaluation.measure import ModeRun, Record, schedule
from specdec.evaluation.summary import mode_figures, timing_notes
from specdec.metrics import AcceptanceCounts, first_divergence, percentile
from specdec.traces import read_prompts

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
    assert counts.per_position_rates == [] and "K varied" in note
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


def test_prompts_from_jsonl_and_text(tmp_path):
    jsonl = tmp_path / "p.jsonl"
    jsonl.write_text('{"prompt": "one\u2028still one"}\n\n{"problem": "two", "answer": 2}\n{"question": "three"}\n')
    assert read_prompts(jsonl) == ["one\u2028still one", "two", "three"]
    text = tmp_path / "p.txt"
    text.write_text("first\n\nsecond\n")
    assert read_prompts(text) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: want a JSON object"),
        ('{"text": "a"}', "line 1: no prompt"),
        ('{"prompt": 3}', "line 1: no prompt"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_schedule_is_seeded_random_and_balanced():
    turns = list(schedule(50, 2, "0/greedy"))
    assert turns == list(schedule(50, 2, "0/greedy")) != list(schedule(50, 2, "1/greedy"))
    first = Counter(order[0] for _, _, order in turns)
    assert first[PLAIN] == first[SPEC] == 50
    assert {order[0] for repeat, _, order in turns if repeat == 0} == {PLAIN, SPEC}


def synthetic_mode(slowdown: float, seed: int = 0, num_prompts: int = 24) -> ModeRun:
    """Noisy TPOTs of about 20 ms; the speculative arm is ``slowdown`` times slower than the plain one."""
    rng = random.Random(seed)
    mode = ModeRun(name="greedy", temperature=0.0)
    for repeat, index, order in schedule(num_prompts, 2, "seed"):
        for arm in order:
            tpot = 0.02 * rng.gauss(1, 0.03) * (slowdown if arm == SPEC else 1)
            result = RequestResult(ttft_sec=0.1, e2e_sec=0.1 + 31 * tpot, num_output_tokens=32, finish_reason="length")
            mode.records.append(Record(mode="greedy", repeat=repeat, prompt_index=index, arm=arm, result=result))
    return mode


def test_an_a_a_run_shows_no_difference():
    low, high = mode_figures(synthetic_mode(1.0))["speedup_ci95"]
    assert low < 1 < high and high - low < 0.05


@pytest.mark.parametrize("slowdown", [1.1, 1.2])
def test_a_planted_slowdown_is_seen(slowdown):
    figures = mode_figures(synthetic_mode(slowdown))
    assert figures["speedup_median"] == pytest.approx(1 / slowdown, rel=0.03)
    assert figures["speedup_ci95"][1] < 1


def test_a_noisy_machine_and_too_few_prompts_are_said():
    quiet = mode_figures(synthetic_mode(1.0))
    assert quiet["tpot_repeat_spread"] < 0.1 and timing_notes({"greedy": quiet}) == []
    mode = synthetic_mode(1.0, num_prompts=4)
    for record in mode.records:
        record.result.e2e_sec *= 1 + 0.5 * record.repeat
    noisy, few = timing_notes({"greedy": mode_figures(mode)})
    assert "not quiet" in noisy and "only 4 prompts" in few


def test_failed_requests_count_as_errors_and_give_no_timing():
    mode = synthetic_mode(1.0, num_prompts=2)
    for record in mode.records:
        if record.prompt_index == 1 and record.arm == SPEC:
            record.result.error = "timeout"
    figures = mode_figures(mode)
    assert figures["errors"] == {"timeout": 2} and figures["num_requests"] == 8
    assert list(figures["speedup_by_prompt"]) == ["0"] and figures["speedup_ci95"] is None


def test_fork_verdicts():
    assert judge_margin({5: -0.70, 9: -0.71}, 5, 9, 0.05)["verdict"] == TIE
    assert judge_margin({5: -0.1, 9: -2.5}, 5, 9, 0.05)["verdict"] == BUG
    outside = judge_margin({5: -0.1, 7: -0.12}, 5, 9, 0.05)  # token 9 is not among the top tokens
    assert outside["verdict"] == BUG and outside["margin_is_lower_bound"]
    low_pair = judge_margin({1: -0.1, 5: -3.0, 9: -3.0}, 5, 9, 0.05)
    assert low_pair["verdict"] == BUG


def test_first_divergence_and_percentile():
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    assert percentile([], 50) is None and percentile([1.0, 2.0], 50) == 1.5 and percentile([3.0], 99) == 3.0


def test_free_ports_differ():
    assert len(set(arms.free_ports(8))) == 8


STAND_IN = """
import json, signal, sys, time
port = sys.argv[sys.argv.index("--port") + 1]
spec = "--head" in sys.argv
print("a line that is no message", flush=True)
if {fails} and spec:
    sys.exit("head does not fit")
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", file=sys.stderr, flush=True), sys.exit(0)))
print(json.dumps({{"ready": True, "url": f"http://127.0.0.1:{{port}}", "model": "m",
                   "num_speculative_tokens": {k} if spec else 0}}), flush=True)
time.sleep(60)
"""


def start_stand_ins(monkeypatch, tmp_path, fails=False, k=3):
    """``started_arms`` with a script in the place of ``specdec serve``."""
    script = tmp_path / "serve.py"
    script.write_text(STAND_IN.format(fails=fails, k=k))
    popen = subprocess.Popen
    monkeypatch.setattr(
        arms.subprocess, "Popen", lambda command, **kw: popen([sys.executable, str(script), *command[3:]], **kw)
    )
    return arms.started_arms(RunConfig(), "t", tmp_path / "head", tmp_path / "out")


def test_servers_that_share_the_cores_compile_on_different_ones(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(arms, "detect_device", lambda: Device(kind="cpu", core_ids=(0, 1), native_bf16=False))
    bound = [load_config(None, arms._binding(RunConfig(), turn)[1:]).serve.threads_bind for turn in (0, 1)]
    assert bound == ["0,1", "1,0"]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert arms._binding(RunConfig(), 1) == []


def test_started_arms_are_ready_and_stopped(monkeypatch, tmp_path):
    with start_stand_ins(monkeypatch, tmp_path) as started:
        assert started[PLAIN].num_speculative_tokens == 0 and started[SPEC].num_speculative_tokens == 3
        assert started[PLAIN].url != started[SPEC].url
    assert "stopped" in (tmp_path / "out" / "plain-server.log").read_text()
    assert "stopped" in (tmp_path / "out" / "spec-server.log").read_text()


def test_a_server_that_ends_early_shows_its_log(monkeypatch, tmp_path):
    with (
        pytest.raises(ValueError, match=r"spec server ended with status 1 [\s\S]*head does not fit"),
        start_stand_ins(monkeypatch, tmp_path, fails=True),
    ):
        pass


def test_a_spec_server_without_speculation_is_refused(monkeypatch, tmp_path):
    with (
        pytest.raises(ValueError, match="came up without speculation"),
        start_stand_ins(monkeypatch, tmp_path, k=0),
    ):
        pass
