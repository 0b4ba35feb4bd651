"""The whole evaluation against fake servers, as the command runs it."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest
from evaluation_runs import PROMPTS, run, settings
from fake_server import FakeServer, serving

from specdec.config import EvalConfig, RunConfig
from specdec.evaluation import measure as measuring
from specdec.evaluation.arms import Arm
from specdec.evaluation.losslessness import BUG, TIE
from specdec.evaluation.measure import WARMUP_PROMPT
from specdec.evaluation.run import evaluate
from specdec.evaluation.stream import StreamReader
from specdec.manifest import HeadManifest, TargetFingerprint
from specdec.record import text_sha256

CONTRACT = {
    "acceptance_length", "acceptance_rate", "per_position_rates", "trained_acceptance_length", "plain_tpot_sec",
    "spec_tpot_sec", "speedup_median", "speedup_ci95", "greedy_identity_rate", "num_requests",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quick")


def test_a_whole_run(tmp_path, capfd):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    plain.faults[PROMPTS[7]] = "429"
    spec.forks[PROMPTS[2]] = (4, 77)
    fork_token = plain.answer(PROMPTS[2], True)[4]
    plain.logprobs = {fork_token: -0.7, 77: -0.72, 3: -4.0}
    plain.texts[PROMPTS[0]] = "It is \\boxed{4}."
    result = run(plain, spec, tmp_path)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == json.loads(json.dumps(result))
    summary = result["summary"]
    assert summary.keys() >= CONTRACT
    assert summary["acceptance_length"] == pytest.approx(3.0)
    assert summary["per_position_rates"] == [1.0, 1.0, 0.0]
    assert summary["speedup_median"] > 1.5 and summary["speedup_ci95"][0] > 1
    assert summary["num_requests"] == 32 and [cell["name"] for cell in result["cells"]] == ["greedy", "sampled"]
    assert result["errors"] == {"http_429": 3} and len(result["requests"]) == 48
    blocks = [block for block in result["blocks"] if (block["cell"], block["arm"]) == ("greedy", "spec")]
    figures = result["cells"][0]["arms"]["spec"]
    assert sum(block["busy_sec"] for block in blocks) == pytest.approx(figures["busy_sec"])
    assert sum(block["num_output_tokens"] for block in blocks) == figures["num_output_tokens"]
    assert summary["greedy_identity_rate"] == pytest.approx(6 / 7)
    (greedy,) = result["losslessness"]["greedy"]
    assert greedy["noise_floor_identity_rate"] == 1.0
    (fork,) = greedy["forks"]
    assert fork["prompt_excerpt"] == PROMPTS[2]
    assert (fork["position"], fork["plain_token"], fork["spec_token"], fork["verdict"]) == (4, fork_token, 77, TIE)
    assert fork["margin_nats"] == pytest.approx(0.02)
    probe = next(body for body in plain.log if "logprobs" in body)
    assert probe["prompt"] == [1, len(PROMPTS[2]), *plain.answer(PROMPTS[2], True)[:4]]
    graded = {(row["cell"], row["arm"]): row["pass_at_1"] for row in result["accuracy"]}
    assert graded["greedy", "plain"] == pytest.approx(1 / 7) and graded["greedy", "spec"] == 0
    assert {"arms", "suites", "latency", "accuracy", "losslessness", "errors"} <= result.keys()
    assert result["latency"]["spec"]["ttft_sec"].keys() == {"p50", "p90", "p99"}
    figures = result["cells"][0]["arms"]["spec"]
    assert 0 < figures["client_cpu_share"] < 10 and figures["client_lag_sec"]["p99"] >= 0
    assert figures["tokens_per_step"] > 1.5 and figures["acceptance"]["draft_width_histogram"] == {"0": 0, "3": 64}
    captured = capfd.readouterr()
    assert captured.out == "" and "speed-up" in captured.err
    assert not list((tmp_path / "out").glob("journal*"))


def test_a_run_to_publish_repeats_no_prompt(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)
    spec.forks[PROMPTS[2]] = (4, 77)
    result = run(plain, spec, tmp_path, prompt_excerpts=False, sampled=False)
    assert result["losslessness"]["greedy"][0]["forks"]
    for name in ("result.json", "report.html", "summary.md"):
        assert "what is question" not in (tmp_path / "out" / name).read_text()


def test_report_is_self_contained_and_escaped(tmp_path):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    spec.forks[PROMPTS[2]] = (4, 77)
    plain.logprobs = {1: -0.1, 2: -4.0}
    result = run(plain, spec, tmp_path, repeats=1, sampled=False)
    assert result["losslessness"]["greedy"][0]["forks"][0]["verdict"] == BUG
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") >= 4 and page.count('src="data:image/svg+xml;base64,') == page.count("<img ")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?\s*(https?:)?//""", page)
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;77&lt;/b&gt;" in page
    assert "| " in (tmp_path / "out" / "summary.md").read_text()


def test_the_arms_take_turns_and_warm_up_is_not_counted(tmp_path):
    order: list[tuple[str, dict]] = []
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=2)
    plain.on_chat = lambda _: order.append(("plain", plain.log[-1]))
    spec.on_chat = lambda _: order.append(("spec", spec.log[-1]))
    result = run(plain, spec, tmp_path, sampled=False)
    assert result["summary"]["num_requests"] == 32
    asked = [(arm, body["messages"][0]["content"], body["max_tokens"]) for arm, body in order]
    assert [prompt for _, prompt, _ in asked[: 2 * measuring.WARMUP_ROUNDS]] == [WARMUP_PROMPT] * 4
    turns = asked[2 * measuring.WARMUP_ROUNDS :]
    # 8 prompts twice: each turn of an arm wakes its server, then measures.
    blocks = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert len(blocks) == 32 and all(len({arm for arm, _, _ in block}) == 1 for block in blocks)
    for arm in ("plain", "spec"):  # with the task that it was asked last
        woken, measured = zip(*((block[0], block[1]) for block in blocks if block[0][0] == arm), strict=True)
        assert {tokens for _, _, tokens in woken} == {measuring.WAKING_TOKENS}
        assert [prompt for _, prompt, _ in woken] == [WARMUP_PROMPT, *(prompt for _, prompt, _ in measured[:-1])]
    pairs = zip(blocks[::2], blocks[1::2], strict=True)
    assert all({a[0][0], b[0][0]} == {"plain", "spec"} and a[1][1] == b[1][1] for a, b in pairs)
    prompts = [block[1][1] for block in blocks[:16:2]]
    assert sorted(prompts) == sorted(PROMPTS) and prompts != PROMPTS


def test_a_closed_loop_keeps_as_many_in_flight_as_it_says(tmp_path):
    now, most, lock = 0, 0, threading.Lock()
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=2)
    reply = plain.answer

    def answer(prompt: str, greedy: bool) -> list[int]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.02)
        with lock:
            now -= 1
        return reply(prompt, greedy)

    plain.answer = answer
    run(plain, spec, tmp_path, concurrency=[3], sampled=False, repeats=1)
    assert most == 3


def test_an_open_loop_sends_on_time_whatever_the_answers_take(tmp_path):
    plain, spec = FakeServer(step_sec=0.05), FakeServer(step_sec=0.05, tokens_per_step=2)
    result = run(plain, spec, tmp_path, arrival="poisson", rate=[50.0], sampled=False, repeats=1)
    busy = result["cells"][0]["arms"]["plain"]["busy_sec"]
    assert busy < 8 * 12 * 0.05 / 2 and result["summary"]["num_requests"] == 16


def test_a_client_that_lags_is_noticed(tmp_path, monkeypatch):
    take = StreamReader.take

    def slowly(self, *args) -> None:
        time.sleep(0.03)
        take(self, *args)

    monkeypatch.setattr(StreamReader, "take", slowly)
    plain, spec = FakeServer(step_sec=0.005), FakeServer(step_sec=0.005, tokens_per_step=3)
    result = run(plain, spec, tmp_path, arrival="gamma:0.5", rate=[100.0], sampled=False, repeats=1)
    notes = " ".join(result["notes"])
    assert "the client sent requests over 50 ms late" in notes and "one time in ten the client woke" in notes
    assert result["cells"][0]["arms"]["plain"]["client_lag_sec"]["p90"] > 0.02


def test_budgets_and_samples_are_swept_and_priced(tmp_path):
    plain, spec = FakeServer(step_sec=0.04, num_tokens=8), FakeServer(step_sec=0.04, num_tokens=8, tokens_per_step=4)
    for server in (plain, spec):
        server.texts = dict.fromkeys(PROMPTS, "<think>") | {"forced": "4"}
    options = {"thinking_budgets": [2, 6], "num_samples": [1, 3], "num_prompts": 2, "max_new_tokens": 3}
    result = run(plain, spec, tmp_path, greedy=False, price_per_hour=36.0, **options)
    rows = {(row["cell"], row["arm"]): row for row in result["accuracy"]}
    names = ["sampled b2 n1", "sampled b6 n1", "sampled b2 n3", "sampled b6 n3"]
    assert sorted(rows) == sorted((name, arm) for name in names for arm in ("plain", "spec"))
    most = rows["sampled b6 n3", "plain"]
    assert (most["mean_output_tokens"], most["num_samples"], most["maj_at_n"]) == (9, 3, 0.0)
    assert rows["sampled b2 n1", "plain"]["sec_per_answer"] < most["sec_per_answer"]
    assert rows["sampled b6 n3", "spec"]["sec_per_answer"] < most["sec_per_answer"]
    assert result["cells"][3]["arms"]["plain"]["cost_per_request"] == pytest.approx(most["sec_per_answer"] / 100)


def test_turns_after_a_failed_one_are_counted_as_not_sent(tmp_path):
    path = tmp_path / "mt_bench.jsonl"
    rows = [{"question_id": i, "category": "writing", "turns": [f"first {i}", "second"]} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    spec.faults["first 1"] = "503"
    result = run(plain, spec, tmp_path, suites=[f"mt_bench={path}"], sampled=False, repeats=1)
    assert result["errors"] == {"http_5xx": 1, "not_sent": 1} and len(result["requests"]) == 8
    (row,) = [row for row in result["requests"] if row["error"] == "not_sent"]
    assert (row["arm"], row["turn"], row["error_detail"]) == ("spec", 1, "turn 1 had failed: http_5xx")


def test_a_load_whose_prompts_give_no_interval_says_so(tmp_path):
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    result = run(plain, spec, tmp_path, concurrency=[2], sampled=False, repeats=1)
    assert result["summary"]["speedup_ci95"] is None
    assert any("no interval" in note and "fewer than three blocks" in note for note in result["notes"])


def test_absent_gold_answers_are_counted(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    for golds, said in ((["4", None], "1 of 2 items have no gold answer"), ([None, None], "2 of 2 items")):
        rows = [{"question": f"{gold}?", **({"answer": gold} if gold else {})} for gold in golds]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
        result = run(plain, spec, tmp_path, suites=[f"gsm8k={path}"], sampled=False, repeats=1)
        assert any(note.startswith(f"gsm8k: {said}") for note in result["notes"]), result["notes"]


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
    assert any("A/A" in note for note in same["notes"])


def test_one_server_asked_in_two_ways_is_two_arms(tmp_path):
    server = FakeServer(step_sec=0.001, tokens_per_step=3)
    config = settings(tmp_path, {}, sampled=False, repeats=1)
    config.eval.arms = [f"off={server.url},xargs.specdec=off", f"auto={server.url}"]
    with serving(server):
        result = evaluate(config, None, tmp_path / "out")
    assert [row["num_speculative_tokens"] for row in result["arms"]] == [0, 3]
    assert len(result["cost_model"]) == 1 and not any("A/A" in note for note in result["notes"])


def test_a_broken_sampler_is_caught(tmp_path):
    plain, spec = FakeServer(step_sec=0.0), FakeServer(step_sec=0.0, tokens_per_step=3)
    honest = plain.answer

    def other_tokens(prompt: str, greedy: bool) -> list[int]:
        return honest(prompt, greedy) if greedy else [token + 1 for token in honest(prompt, greedy)]

    spec.answer = other_tokens
    options = {"greedy": False, "distribution_samples": 20, "distribution_prompts": 2}
    (row,) = run(plain, spec, tmp_path, **options)["losslessness"]["distribution"]
    assert row["arm"] == "spec" and row["lossy"] and row["num_prompts"] == 2 and row["num_samples"] == 20
    spec.answer = honest
    plain2, spec2 = FakeServer(step_sec=0.0), FakeServer(step_sec=0.0, tokens_per_step=3)
    (row,) = run(plain2, spec2, tmp_path, **options)["losslessness"]["distribution"]
    assert not row["lossy"]


def test_servers_that_want_a_key_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    plain.api_key = spec.api_key = "secret"
    assert run(plain, spec, tmp_path, sampled=False, repeats=1)["errors"] == {}
    assert "secret" not in (tmp_path / "out" / "result.json").read_text()
    monkeypatch.setenv("VLLM_API_KEY", "another")
    spec = FakeServer()
    spec.api_key = "secret"
    with pytest.raises(ValueError, match=r"(?s)spec server .*401.*VLLM_API_KEY"):
        run(FakeServer(), spec, tmp_path)


def test_a_failed_warm_up_names_the_arm(tmp_path):
    spec = FakeServer(tokens_per_step=2)
    spec.faults[WARMUP_PROMPT] = "503"
    with pytest.raises(ValueError, match=r"the spec arm .* http_5xx"):
        run(FakeServer(), spec, tmp_path)


def test_a_server_that_dies_in_the_middle_is_counted(tmp_path):
    plain, spec = FakeServer(), FakeServer(tokens_per_step=3)

    def die(number: int) -> None:
        if number == 6:
            threading.Thread(target=lambda: (spec.shutdown(), spec.socket.close())).start()

    spec.on_chat = die
    result = run(plain, spec, tmp_path, repeats=1, sampled=False)
    assert result["errors"].get("disconnected", 0) >= 3 and result["summary"]["num_requests"] == 16
    assert result["summary"]["speedup_median"] is not None
    assert any("no counters" in note for note in result["notes"])


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
        is_quantised = False

        def fingerprint(self) -> TargetFingerprint:
            return fingerprint

    plain, spec = FakeServer(step_sec=0.001), FakeServer(step_sec=0.001, tokens_per_step=3)
    served = {"plain": plain, "spec": spec}

    def start(specs, config, out_dir, servers):
        return {
            each.name: Arm(
                name=each.name, url=served[each.name].url, model="m", options=each.options,
                num_speculative_tokens=3 * ("head" in each.options),
            )
            for each in specs
        }  # fmt: skip

    monkeypatch.setattr("specdec.evaluation.run.resolve_target", lambda config: Resolved())
    monkeypatch.setattr("specdec.evaluation.arms._start", start)
    config = settings(tmp_path, served, repeats=1, sampled=False, arms=[])
    with serving(plain, spec):
        result = evaluate(config, head, tmp_path / "out")
        fingerprint.hidden_size = 2
        with pytest.raises(ValueError, match="trained for another target"):
            evaluate(config, head, tmp_path / "out2")
    assert result["summary"]["trained_acceptance_length"] == pytest.approx(3.0)
    assert result["provenance"]["head"]["name"] == "eagle3"
    assert result["provenance"]["head"]["directory"] == str(head)


def test_bad_arguments_are_refused_before_anything_starts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="give --suite NAME"):
        evaluate(RunConfig(), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="give --head DIR"):
        evaluate(RunConfig(eval=EvalConfig(suites=[str(path)])), None, tmp_path)
    with pytest.raises(ValueError, match="head directory"):
        evaluate(RunConfig(eval=EvalConfig(suites=[str(path)])), tmp_path / "absent", tmp_path)
