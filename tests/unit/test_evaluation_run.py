"""The whole evaluation against two fake servers, as the command runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading

import pytest
from test_evaluation_client import FakeServer, serving

from specdec.config import EvalConfig, RunConfig
from specdec.evaluation import measure as measuring
from specdec.evaluation.arms import PLAIN, SPEC, given_arms
from specdec.evaluation.losslessness import BUG, TIE, check_losslessness
from specdec.evaluation.measure import WARMUP_PROMPT, measure
from specdec.evaluation.report import render_report
from specdec.evaluation.run import evaluate
from specdec.manifest import HeadManifest, TargetFingerprint
from specdec.record import text_sha256

PROMPTS = [f"question {i} <script>alert({i})</script>" for i in range(8)]
CONTRACT = {
    "acceptance_length", "acceptance_rate", "per_position_rates", "trained_acceptance_length", "plain_tpot_sec",
    "spec_tpot_sec", "speedup_median", "speedup_ci95", "greedy_identity_rate", "num_requests",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Drawing takes most of the time; the tests that look at the report draw."""
    if "report" not in request.node.name:
        monkeypatch.setattr("specdec.evaluation.report.draw_plots", lambda result: [])


def run(plain, spec, tmp_path, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    config = RunConfig(eval=EvalConfig(**{"max_new_tokens": 12, **options}))
    with serving(*{id(server): server for server in (plain, spec)}.values()):
        return evaluate(config, "fake", None, path, tmp_path / "out", plain.url, spec.url)


def test_a_whole_run(tmp_path, capfd):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    plain.faults[PROMPTS[7]] = "429"
    spec.forks[PROMPTS[2]] = (4, 77)
    fork_token = plain.answer(PROMPTS[2], True)[4]
    plain.logprobs = {fork_token: -0.7, 77: -0.72, 3: -4.0}
    result = run(plain, spec, tmp_path)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    summary = result["summary"]
    assert summary.keys() >= CONTRACT
    assert summary["acceptance_length"] == pytest.approx(3.0)
    assert summary["per_position_rates"] == [1.0, 1.0, 0.0]
    assert summary["speedup_median"] > 1.5 and summary["speedup_ci95"][0] > 1
    assert summary["num_requests"] == 32 and set(result["modes"]) == {"greedy", "sampled"}
    assert result["errors"] == {"http_429": 3} and len(result["requests"]) == 48
    assert summary["greedy_identity_rate"] == pytest.approx(6 / 7)
    assert result["losslessness"]["noise_floor_identity_rate"] == 1.0
    (fork,) = result["losslessness"]["forks"]
    assert (fork["position"], fork["plain_token"], fork["spec_token"], fork["verdict"]) == (4, fork_token, 77, TIE)
    assert fork["margin_nats"] == pytest.approx(0.02)
    probe = plain.log[-1]
    assert probe["prompt"] == [1, len(PROMPTS[2]), *plain.answer(PROMPTS[2], True)[:4]]
    assert result["provenance"]["prompts_sha256"] == text_sha256(*PROMPTS)
    captured = capfd.readouterr()
    assert captured.out == "" and "speed-up" in captured.err


def test_report_is_self_contained_and_escaped(tmp_path):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    spec.forks[PROMPTS[2]] = (4, 77)
    plain.logprobs = {1: -0.1, 2: -4.0}
    result = run(plain, spec, tmp_path, repeats=1, sampled=False)
    assert result["losslessness"]["forks"][0]["verdict"] == BUG
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 4 and page.count('src="data:image/svg+xml;base64,') == 4
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", page)
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;77&lt;/b&gt;" in page


def test_the_arms_take_turns_and_warm_up_is_not_counted(tmp_path):
    order: list[str] = []
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=2)
    plain.on_chat = lambda _: order.append(PLAIN)
    spec.on_chat = lambda _: order.append(SPEC)
    result = run(plain, spec, tmp_path, concurrency=3, sampled=False)
    warmup = [body for body in plain.log if body["messages"][0]["content"] == WARMUP_PROMPT]
    assert len(warmup) == 2 * 3 and result["summary"]["num_requests"] == 32
    counted = order[2 * 2 * 3 :]
    blocks = [counted[i : i + n] for i, n in zip((0, 3, 6, 9, 12, 14), (3, 3, 3, 3, 2, 2), strict=True)]
    assert all(len(set(block)) == 1 for block in blocks)  # a block stays with one arm
    assert all({a[0], b[0]} == {PLAIN, SPEC} for a, b in zip(blocks[::2], blocks[1::2], strict=True))
    prompts = [body["messages"][0]["content"] for body in plain.log[6:14]]
    assert sorted(prompts) == sorted(PROMPTS)


def test_a_planted_slowdown_is_visible_over_http(tmp_path):
    plain, spec = FakeServer(step_sec=0.02, num_tokens=6), FakeServer(step_sec=0.024, num_tokens=6)
    spec.speculative = True
    summary = run(plain, spec, tmp_path, sampled=False, repeats=1)["summary"]
    # Loose, because the machine that runs tests may be busy; the statistics are tested on synthetic timings.
    assert 0.7 < summary["speedup_median"] < 0.95


def test_one_server_as_both_arms_is_an_a_a_run(tmp_path):
    server = FakeServer(step_sec=0.01, num_tokens=6)
    same = run(server, server, tmp_path, sampled=False, repeats=1)
    assert 0.8 < same["summary"]["speedup_median"] < 1.25
    assert same["summary"]["greedy_identity_rate"] == 1.0 and same["summary"]["acceptance_length"] is None
    assert any("A/A" in note for note in same["notes"]) and any("spec_decode" in note for note in same["notes"])


def test_a_spec_arm_without_counters_is_refused_before_measuring(tmp_path):
    plain, spec = FakeServer(), FakeServer()
    with pytest.raises(ValueError, match="vllm:spec_decode_num_drafts_total"):
        run(plain, spec, tmp_path)
    assert len(plain.log) == measuring.WARMUP_ROUNDS


def test_a_failed_warm_up_names_the_arm(tmp_path):
    spec = FakeServer(tokens_per_step=2)
    spec.faults[WARMUP_PROMPT] = "503"
    with pytest.raises(ValueError, match=r"the spec arm .* http_5xx"):
        run(FakeServer(), spec, tmp_path)


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    spec.on_chat = lambda number: number == 6 and os.kill(os.getpid(), signal.SIGINT)
    result = run(plain, spec, tmp_path)
    assert result["interrupted"] and 4 <= result["summary"]["num_requests"] < 32
    assert result["summary"]["acceptance_length"] == pytest.approx(3.0)
    assert "interrupted" in (tmp_path / "out" / "report.html").read_text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_server_that_dies_in_the_middle_is_counted(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)

    def die(number: int) -> None:
        if number == 6:
            threading.Thread(target=lambda: (spec.shutdown(), spec.socket.close())).start()

    spec.on_chat = die
    result = run(plain, spec, tmp_path, repeats=1, sampled=False)
    assert result["errors"].get("disconnected", 0) >= 3 and result["summary"]["num_requests"] == 16
    assert result["summary"]["speedup_median"] is not None
    assert any("no acceptance" in note for note in result["notes"])


def test_trained_acceptance_comes_from_the_manifest(tmp_path, monkeypatch):
    fingerprint = TargetFingerprint(
        architecture="LlamaForCausalLM", hidden_size=1, num_hidden_layers=1, vocab_size=1,
        weights_sha256="w", chat_template_sha256="c",
    )  # fmt: skip
    head = tmp_path / "head"
    HeadManifest(
        head="eagle3", vllm_method="eagle3", num_speculative_tokens=3, target_name="fake", target=fingerprint,
        draft_vocab_size=8, acceptance_by_prompt={text_sha256(prompt): [3, 2, 1] for prompt in PROMPTS},
    ).save(head)  # fmt: skip

    class Resolved:
        sampling = None

        def fingerprint(self) -> TargetFingerprint:
            return fingerprint

    monkeypatch.setattr("specdec.evaluation.run.resolve_target", lambda config: Resolved())
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    with serving(plain, spec):
        config = RunConfig(eval=EvalConfig(repeats=1, sampled=False, max_new_tokens=12))
        result = evaluate(config, "fake", head, path, tmp_path / "out", plain.url, spec.url)
        fingerprint.hidden_size = 2
        with pytest.raises(ValueError, match="trained for another target"):
            evaluate(config, "fake", head, path, tmp_path / "out", plain.url, spec.url)
    assert result["summary"]["trained_acceptance_length"] == pytest.approx(3.0)
    assert result["provenance"]["head"]["name"] == "eagle3"
    assert "measured by training" in render_report(result)


def test_bad_arguments_are_refused_early(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="give both servers"):
        evaluate(RunConfig(), "fake", None, path, tmp_path, "http://127.0.0.1:1", None)
    with pytest.raises(ValueError, match="give --head DIR"):
        evaluate(RunConfig(), "fake", None, path, tmp_path)
    with pytest.raises(ValueError, match="head directory"):
        evaluate(RunConfig(), "fake", tmp_path / "absent", path, tmp_path)


def test_differently_rendered_prompts_are_no_identity(tmp_path):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=2)
    config = EvalConfig(repeats=1, sampled=False, max_new_tokens=4)
    with serving(plain, spec):
        both = given_arms(plain.url, spec.url + "/v1/")
        measurement = measure(config, both, PROMPTS[:2])
        for record in measurement.modes["greedy"].records:
            if record.arm == SPEC and record.prompt_index == 0:
                record.result.prompt_token_ids = [1, 2, 3, 4]
        found = check_losslessness(measurement, both, "float32")
    assert found["greedy_identity_rate"] == 0.5 and "different prompts" in found["forks"][0]["why"]
    assert found["noise_floor_identity_rate"] is None
