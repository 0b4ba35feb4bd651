"""The command line as a user meets it: a mistake is one line with the fix and exit code 2, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.config import TargetConfig
from specdec.manifest import HeadManifest
from specdec.targets import resolve_target
from tests.tiny import save_tiny_target


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


def specdec(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "specdec", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_user_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith("error: ") and "Traceback" not in done.stderr
    assert all(part in last for part in parts), last
    assert done.stdout == ""


@pytest.fixture
def foreign_head(target, tmp_path) -> Path:
    fingerprint = dataclasses.replace(resolve_target(TargetConfig(name=str(target))).fingerprint(), hidden_size=4096)
    HeadManifest(
        head="eagle3", vllm_method="eagle3", num_speculative_tokens=3, target_name="big", target=fingerprint,
        draft_vocab_size=10,
    ).save(tmp_path)  # fmt: skip
    return tmp_path


def test_an_unknown_target_names_the_choices(tmp_path):
    done = specdec("train", "--target", "smolm2", "--out", tmp_path)
    assert_user_error(done, "unknown target 'smolm2'", "smollm2-135m")


def test_an_unknown_head_names_the_choices(target, tmp_path):
    done = specdec("train", "--target", target, "--head", "eagle9", "--out", tmp_path)
    assert_user_error(done, "unknown head 'eagle9'", "eagle3")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "is empty"), ('{"problem": "a", "response": "b"}\n{"problem": \n', "line 2: not JSON")],
)
def test_a_bad_trace_file_is_named_by_line(target, tmp_path, content, complaint):
    traces = tmp_path / "traces.jsonl"
    traces.write_text(content)
    done = specdec("train", "--target", target, "--traces", traces, "--out", tmp_path / "head")
    assert_user_error(done, "traces.jsonl", complaint)


def test_a_missing_trace_file_is_named(target, tmp_path):
    done = specdec("train", "--target", target, "--traces", tmp_path / "none.jsonl", "--out", tmp_path / "head")
    assert_user_error(done, "none.jsonl")


@pytest.mark.parametrize("command", ["serve", "eval"])
def test_a_head_of_another_target_is_refused_before_anything_starts(target, foreign_head, tmp_path, command):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "hi"}) + "\n")
    strict = ["--set", "serve.require_head=true"]
    rest = ["--prompts", prompts, "--out", tmp_path / "out"] if command == "eval" else strict
    done = specdec(command, "--target", target, "--head", foreign_head, *rest)
    assert_user_error(done, "trained for another target (big)", "hidden_size 4096 != 64")


def test_a_port_in_use_is_named(target):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = specdec("serve", "--target", target, "--no-speculation", "--port", port)
    assert_user_error(done, f"port {port}", "in use")


def test_serving_without_a_head_says_which_option_is_missing(target):
    assert_user_error(specdec("serve", "--target", target), "--head", "--no-speculation")


def test_a_mistyped_setting_names_the_nearest(tmp_path):
    done = specdec("train", "--out", tmp_path, "--set", "train.learning_rat=1")
    assert_user_error(done, "did you mean train.learning_rate")


def test_a_mistyped_option_of_serve_is_not_handed_to_vllm(target):
    assert_user_error(specdec("serve", "--target", target, "--no-speculations"), "--no-speculations", "after --")


def test_a_target_that_stands_alone_is_told_its_option():
    assert_user_error(specdec("serve", "some/model", "--port", "0"), "--target some/model")


def test_a_full_disk_is_named_and_nothing_is_lost(target, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import specdec.cli, specdec.targets as t, errno\n"
         "def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')\n"
         "t._convert_embedded = full\nspecdec.cli.main()", "train", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=60, env={"PATH": "", "SPECDEC_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert_user_error(done, "no room", "SPECDEC_CACHE_DIR")


def test_a_measurement_that_was_interrupted_ends_like_one(tmp_path, monkeypatch):
    from specdec.evaluation import run

    asked = []

    def evaluate(config, head, out):
        asked.append(config.eval)
        return {"interrupted": len(asked) == 2, "summary": {"num_requests": 3}}

    monkeypatch.setattr(run, "evaluate", evaluate)
    options = ["--concurrency", "1,4", "--rate", "0.5,2", "--samples", "1,4", "--thinking-budget", "64,256"]
    arms = ["--arm", "a=http://x", "--arm", "b=http://y"]
    command = ["eval", "--out", str(tmp_path), "--suite", "gsm8k", *arms, "--arrival", "gamma:0.5", *options]
    codes = [CliRunner().invoke(app, command).exit_code for _ in range(2)]
    assert codes == [0, 130]
    config = asked[0]
    assert (config.concurrency, config.rate, config.num_samples) == ([1, 4], [0.5, 2.0], [1, 4])
    assert (config.thinking_budgets, config.arrival, config.suites) == ([64, 256], "gamma:0.5", ["gsm8k"])
    assert config.arms == ["a=http://x", "b=http://y"]


def test_env_reports_what_is_missing_and_prints_json():
    done = specdec("env", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert all({"what", "fix"} <= set(problem) for problem in report["problems"])
