"""Rows to head on a tiny target: data cards, splits, interruption and resumption, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from draft_training.completions import load_completions
from draft_training.draft_vocabulary import count_completion_tokens
from draft_training.heads import list_heads, load_head
from draft_training.prepare import prepare
from draft_training.row_store import load_rows
from draft_training.train import KERNEL_CACHES, KERNELS_KEPT, train
from draft_training.trainer import learning_rate_factor
from specdec.cli import app
from specdec.config import RunConfig, TargetConfig, load_config
from specdec.doctor import diagnose
from specdec.manifest import HeadManifest
from specdec.targets import resolve_target
from tests.tiny import save_tiny_target


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A tiny target and a trace file of twelve conversations, one of them twice."""
    root = tmp_path_factory.mktemp("workspace")
    save_tiny_target(root / "target")
    items = [{"problem": f"{i}+{i}?", "reasoning": f"twice {i}", "response": str(2 * i)} for i in range(12)]
    (root / "traces.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*items, items[3]]))
    return root


def small_head(name: str) -> list[str]:
    """Settings of a head of 64 draft tokens, or of the whole vocabulary where it has no smaller one."""
    options = load_head(name).options_cls
    return ["head.options.draft_vocab_size=64"] if hasattr(options, "draft_vocab_size") else []


def small_run(head: str = "eagle3") -> list[str]:
    of_head = [f"head.name={head}", *small_head(head)]
    return ["train.epochs=3", "train.batch_tokens=128", "traces.val_fraction=0.25", *of_head]


def config_for(workspace: Path, *overrides: str, head: str = "eagle3") -> RunConfig:
    return load_config(None, [f"target.name={workspace / 'target'}", *small_run(head), *overrides])


def test_train_on_a_trace_file_leaves_a_complete_head(workspace, tmp_path):
    manifest = train(config_for(workspace), workspace / "traces.jsonl", tmp_path)
    assert HeadManifest.load(tmp_path) == manifest
    assert 1 <= manifest.acceptance["acceptance_length"] <= 4
    assert manifest.acceptance["on_policy"] is False
    drafts = sum(len(accepted) for accepted in manifest.acceptance_by_prompt.values())
    assert drafts == manifest.acceptance["num_drafts"]
    card = json.loads((tmp_path / "rows" / "card.json").read_text())
    card_example = f"{workspace / 'traces.jsonl'} line 13"
    assert card["splits"]["train"]["rows"] + card["splits"]["val"]["rows"] == 12
    assert card["dropped"] == {"near-duplicate of an earlier row": {"rows": 1, "examples": [card_example]}}
    assert card["splits"]["val"]["conversations"] == 3
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(config_for(workspace), workspace / "traces.jsonl", tmp_path) == manifest
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("head", list_heads())
def test_every_head_trains_from_the_command_line(workspace, tmp_path, head):
    settings = ["train.epochs=1", "train.batch_tokens=512", "traces.val_fraction=0.25", *small_head(head)]
    arguments = ["--target", str(workspace / "target"), "--traces", str(workspace / "traces.jsonl"), "--head", head]
    done = CliRunner().invoke(app, ["train", *arguments, "--out", str(tmp_path), *(f"--set={s}" for s in settings)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["acceptance_length"] >= 1
    manifest = HeadManifest.load(tmp_path)
    spec = load_head(head)
    assert (manifest.head, manifest.vllm_method) == (head, spec.vllm_method)
    assert manifest.vllm_speculative == spec.vllm_speculative
    assert manifest.draft_vocab_size == (64 if "draft_vocab_size" in "".join(small_head(head)) else 262)
    assert diagnose(tmp_path, resolve_target(TargetConfig(name=str(workspace / "target")))) == []


@pytest.mark.parametrize(
    ("kill", "head", "recipe"),
    [
        (signal.SIGINT, "eagle3", []),
        *((signal.SIGKILL, head, []) for head in list_heads()),
        (signal.SIGKILL, "eagle3", ["train.optimizer=muon", "train.ema=0.9", "train.pack_tokens=128"]),
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(workspace, tmp_path, kill, head, recipe):
    """Killed at a random step, of which each leaves a checkpoint."""
    config = config_for(workspace, *recipe, head=head)
    train(config, workspace / "traces.jsonl", tmp_path / "whole")
    num_steps = len((tmp_path / "whole" / "work" / "train_log.jsonl").read_text().splitlines())
    last = random.randrange(1, num_steps)
    print(f"killed after step {last} of {num_steps}")  # noqa: T201 - shown when it fails
    command = [
        sys.executable, "-m", "specdec", "train", "--target", str(workspace / "target"),
        "--traces", str(workspace / "traces.jsonl"), "--out", str(tmp_path / "cut"),
        *[f"--set={item}" for item in (*small_run(head), "train.checkpoint_every_sec=0.0", *recipe)],
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "work" / "train_log.jsonl"

    def has_come() -> bool:
        return log.is_file() and len(log.read_text().splitlines()) >= last

    watcher = threading.Thread(target=lambda: _signal_when(has_come, process, kill))
    watcher.start()
    _, errors = process.communicate(timeout=120)
    watcher.join()
    if kill == signal.SIGINT and process.returncode != 0:
        assert process.returncode == 2
        assert "run the same command to continue" in errors.splitlines()[-1]
    resumed = config_for(workspace, *recipe, head=head)
    resumed.train.checkpoint_every_sec = 0.0
    train(resumed, workspace / "traces.jsonl", tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(whole[name].equal(cut[name]) for name in whole)


def _signal_when(condition, process, kill):
    while not condition() and process.poll() is None:
        time.sleep(0.005)
    if process.poll() is None:
        process.send_signal(kill)


def test_another_configuration_is_refused_and_loses_nothing(workspace, tmp_path):
    train(config_for(workspace), workspace / "traces.jsonl", tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        train(config_for(workspace, "train.epochs=4"), workspace / "traces.jsonl", tmp_path)
    assert HeadManifest.load(tmp_path)


def test_long_rows_come_in_windows_and_the_next_head_finds_the_features_on_disk(workspace, tmp_path):
    windows = ["train.window_tokens=8", "train.epochs=2"]
    on_disk = f"train.feature_cache_dir={tmp_path / 'features'}"
    manifest = train(config_for(workspace, *windows, on_disk), workspace / "traces.jsonl", tmp_path / "eagle3")
    coverage = manifest.provenance["coverage"]
    assert coverage["num_windowed_rows"] == coverage["num_rows"] == 9
    assert 0 < coverage["share"] == coverage["num_covered"] / coverage["num_positions"] < 1
    along = manifest.acceptance["by_output_position"]
    assert (along[0]["start"], along[0]["end"]) == (0, 32)
    assert sum(each["num_drafts"] for each in along) == manifest.acceptance["num_drafts"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    assert len(before) == 2 * 2  # splits; of this shallow target, one layer and the last hidden state
    medusa = config_for(workspace, *windows, on_disk, "head.name=medusa")
    train(medusa, tmp_path / "eagle3" / "rows", tmp_path / "medusa")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")} == before
    in_memory = config_for(workspace, *windows, "train.feature_cache_gib=0")  # where features lie changes no head
    assert train(in_memory, workspace / "traces.jsonl", tmp_path / "eagle3") == manifest


def test_unknown_head_and_option_are_named(workspace, tmp_path):
    with pytest.raises(ValueError, match="unknown head 'eagle9'; known: eagle, eagle3, medusa, peagle"):
        train(config_for(workspace, "head.name=eagle9"), workspace / "traces.jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"did you mean head\.options\.norm_output"):
        train(config_for(workspace, "head.options.norm_outputs=true"), workspace / "traces.jsonl", tmp_path)


def test_a_frozen_lm_head_stays_the_target_s_rows(workspace, tmp_path):
    train(config_for(workspace, "train.lm_head_lr_scale=0"), workspace / "traces.jsonl", tmp_path)
    d2t = load_file(tmp_path / "model.safetensors")["d2t"]
    rows = load_file(workspace / "target" / "model.safetensors")["model.embed_tokens.weight"]  # tied
    lm_head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(lm_head, rows[d2t + torch.arange(len(d2t))].bfloat16())


def test_a_vocabulary_chosen_by_coverage_is_as_small_as_it_may_be(workspace, tmp_path):
    overrides = ["head.options.draft_vocab_coverage=0.9", "train.epochs=1", "train.num_evals=1"]
    manifest = train(config_for(workspace, *overrides), workspace / "traces.jsonl", tmp_path)
    counts = count_completion_tokens(load_rows(tmp_path / "rows" / "train"))
    best = [count for _, count in counts.most_common()]
    n = manifest.draft_vocab_size
    assert sum(best[:n]) >= 0.9 * sum(best) > sum(best[: n - 1])
    assert manifest.provenance["draft_vocab_coverage"] == sum(best[:n]) / sum(best)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.loss=kl", r"train\.loss must be one of cross_entropy, lk_hybrid, lk_log; got 'kl'"),
        ("train.optimizer=sgd", r"train\.optimizer must be one of auto, muon, adamw"),
        ("train.position_weights=flat", r"train\.position_weights must be one of decay, survival"),
        ("train.ema=1", r"train\.ema must be at least 0 .* below 1, got 1"),
        ("train.epochs=0", r"train\.epochs must be a number above 0"),
        ("train.epochs=.inf", r"train\.epochs must be a number above 0"),
        ("train.survival_floor=2", r"train\.survival_floor must be from 0 to 1"),
        ("train.pack_tokens=0", r"train\.pack_tokens must be at least 1"),
        ("train.lm_head_lr_scale=-1", r"train\.lm_head_lr_scale must not be negative"),
        ("head.options.draft_vocab_coverage=99", r"draft_vocab_coverage is a share above 0 and up to 1, got 99"),
    ],
)
def test_a_recipe_that_nobody_knows_is_refused(workspace, tmp_path, override, words):
    with pytest.raises(ValueError, match=words):
        train(config_for(workspace, override), workspace / "traces.jsonl", tmp_path)


def test_long_rows_are_dropped_and_counted_never_cut(workspace, tmp_path):
    config = config_for(workspace)
    config.traces.files = [str(workspace / "traces.jsonl")]
    prepare(config, tmp_path / "all")
    lengths = [len(row.input_ids) for name in ("train", "val") for row in load_rows(tmp_path / "all" / name)]
    config.traces.max_length = max(lengths) - 1
    card = prepare(config, tmp_path / "short")
    dropped = card["dropped"][f"longer than traces.max_length of {max(lengths) - 1} tokens"]
    assert dropped["rows"] == lengths.count(max(lengths)) and "traces.jsonl line" in dropped["examples"][0]
    kept = [len(row.input_ids) for name in ("train", "val") for row in load_rows(tmp_path / "short" / name)]
    assert sorted(kept) == sorted(length for length in lengths if length < max(lengths))


def test_rows_of_other_settings_are_kept(workspace, tmp_path):
    config = config_for(workspace)
    config.traces.files = [str(workspace / "traces.jsonl")]
    prepare(config, tmp_path)
    config.traces.seed = 1
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        prepare(config, tmp_path)


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path):
    path = tmp_path / "completions.jsonl"
    whole = json.dumps({"conversation_id": "a", "completion_ids": [1]}) + "\n"
    path.write_text(whole + '{"conversation_id": "b", "comple')
    assert list(load_completions(path)) == ["a"]
    assert path.read_text() == whole


def test_learning_rate_warms_up_and_ends_at_zero():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[55] == 0.5 and factors[-1] < 0.012
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_kernel_caches_are_bounded_before_anything_computes_unless_the_user_says_how(monkeypatch, tmp_path):
    first, second = KERNEL_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.delenv(second, raising=False)
    with pytest.raises(ValueError, match="unknown target"):
        train(RunConfig(target=TargetConfig(name="nowhere")), None, tmp_path)
    assert (os.environ[first], os.environ[second]) == ("7", str(KERNELS_KEPT))
