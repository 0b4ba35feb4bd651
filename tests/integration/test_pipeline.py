"""prepare, train, serve and eval through the command line, on a tiny random target, with real vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from draft_training.exported import acceptance_on
from specdec.config import RunConfig, TargetConfig
from specdec.evaluation.answers import read_answers
from specdec.metrics import AcceptanceCounts
from tests.tiny import save_tiny_target

pytestmark = pytest.mark.vllm

SETTINGS = (
    "traces.max_new_tokens=48", "traces.temperature=0.0", "traces.val_fraction=0.2",
    "head.options.draft_vocab_size=200", "train.epochs=10", "train.batch_tokens=256", "train.learning_rate=0.003",
    "serve.enforce_eager=true", "serve.max_model_len=256", "serve.kv_cache_gib=1", "serve.max_num_seqs=4",
    "eval.num_prompts=4", "eval.max_new_tokens=48", "eval.repeats=1", "eval.sampled=true",
    "eval.distribution_samples=16",
)  # fmt: skip
SUMMARY_KEYS = {
    "acceptance_length", "acceptance_rate", "per_position_rates", "trained_acceptance_length", "plain_tpot_sec",
    "spec_tpot_sec", "speedup_median", "speedup_ci95", "greedy_identity_rate", "num_requests",
}  # fmt: skip
PROVENANCE_KEYS = {
    "command", "git_sha", "git_dirty", "versions", "hardware", "target", "head", "num_speculative_tokens",
    "temperature", "prompts_sha256",
}  # fmt: skip


def specdec(*arguments: object) -> dict:
    command = [sys.executable, "-m", "specdec", *map(str, arguments), *(f"--set={item}" for item in SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-20000:]
    (line,) = done.stdout.strip().splitlines()
    return json.loads(line)


def test_from_prompts_to_a_measured_acceptance_that_equals_training_s(tmp_path: Path):
    target = save_tiny_target(tmp_path / "target", initializer_range=0.15)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"What is {i} plus {i + 7}?\n" for i in range(24)))
    rows, head, out = tmp_path / "rows", tmp_path / "head", tmp_path / "out"

    card = specdec("prepare", "--target", target, "--prompts", prompts, "--out", rows)
    assert card["splits"]["train"]["rows"] + card["splits"]["val"]["rows"] == 24
    completions = (rows / "completions.jsonl").read_text()
    assert specdec("prepare", "--target", target, "--prompts", prompts, "--out", rows) == card
    assert (rows / "completions.jsonl").read_text() == completions

    trained = specdec("train", "--target", target, "--traces", rows, "--head", "eagle3", "--out", head)
    assert trained["acceptance_length"] > 1.05

    arms = ("--arm", "plain=plain", "--arm", f"spec=head={head}", "--arm", "lookup=method=ngram,k=2")
    summary = specdec("eval", "--target", target, "--prompts", rows / "val_prompts.jsonl", "--out", out, *arms)
    result = json.loads((out / "result.json").read_text())
    assert set(result["summary"]) >= SUMMARY_KEYS and set(result["provenance"]) >= PROVENANCE_KEYS
    assert result["errors"] == {}
    assert summary["greedy_identity_rate"] == 1.0
    assert summary["acceptance_length"] == pytest.approx(summary["trained_acceptance_length"], rel=0.05)
    assert len(summary["speedup_ci95"]) == 2 and summary["plain_tpot_sec"] > 0
    assert "data:image/svg+xml" in (out / "report.html").read_text()

    greedy = result["cells"][0]["arms"]
    assert [arm["num_speculative_tokens"] for arm in result["arms"]] == [0, 3, 2]
    # What each request says of its own steps adds up to the server's counters.
    rows_of_spec = [row for row in result["requests"] if row["arm"] == "spec" and row["cell"] == "greedy"]
    assert sum(row["num_drafts"] for row in rows_of_spec) == greedy["spec"]["acceptance"]["num_drafts"]
    assert greedy["spec"]["acceptance"]["draft_width_histogram"].get("3", 0) > 0
    assert 0.5 < greedy["plain"]["tokens_per_step"] <= 1.01 < greedy["spec"]["tokens_per_step"]
    assert not any(row["lossy"] for row in result["losslessness"]["distribution"])
    assert {row["arm"] for row in result["losslessness"]["distribution"]} == {"spec", "lookup"}

    # On the very answers that were served, sampled ones too, training's walk accepts what the server did.
    run = RunConfig(target=TargetConfig(name=str(target)))
    for cell in result["cells"]:
        served = AcceptanceCounts()
        pairs = []
        for answer in read_answers(out / "answers.jsonl"):
            if (answer.arm, answer.cell) == ("spec", cell["name"]):
                pairs.append((answer.prompt_token_ids, answer.token_ids))
                for num_accepted in answer.accepted_per_step:
                    served.record(3, num_accepted)
        walked = acceptance_on(run, head, pairs)
        beyond = 3 * len(pairs)  # what a server accepts behind an answer's last token is nowhere to be seen
        assert 0 < served.num_accepted_tokens < served.num_draft_tokens, cell["name"]
        assert walked.num_accepted_tokens == pytest.approx(
            served.num_accepted_tokens, abs=beyond + 0.03 * served.num_drafts
        )
        assert walked.num_drafts == pytest.approx(served.num_drafts, abs=0.03 * served.num_drafts)
