"""What goes wrong in a long run: damaged files, other settings, losses that are no numbers, missing packages."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draft_training.checkpoint import CHECKPOINT_NAME, PREVIOUS_NAME, load_checkpoint, save_checkpoint
from draft_training.interrupt import Interrupted
from draft_training.run_identity import differences
from draft_training.step import GradientMaker
from draft_training.train import train
from draft_training.train_log import TrainLog, require_tensorboard
from specdec.config import RunConfig, load_config
from tests.tiny import save_tiny_target

SMALL = ["train.batch_tokens=128", "head.options.draft_vocab_size=64", "traces.val_fraction=0.25", "train.num_evals=1"]
EVERY_STEP = "train.checkpoint_every_sec=0.0"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny target, traces, and ``whole``: a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("failures")
    save_tiny_target(root / "target")
    items = [{"problem": f"{i}+{i}?", "reasoning": f"twice {i}", "response": str(2 * i)} for i in range(12)]
    (root / "traces.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    train(config_for(root), root / "traces.jsonl", root / "whole")
    return root


def config_for(root: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"target.name={root / 'target'}", "train.epochs=3", *SMALL, *overrides])


def stop_at(monkeypatch, step: int) -> None:
    """The run is asked to stop in the midst of this step."""
    compute = GradientMaker.run

    def run(self, rows, wishes):
        figures = compute(self, rows, wishes)
        calls.append(rows)
        return figures if len(calls) < step else replace(figures, wishes=[True, True])

    calls: list[list[int]] = []
    monkeypatch.setattr(GradientMaker, "run", run)


def stopped(root: Path, out: Path, monkeypatch, step: int, *overrides: str) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted):
            train(config_for(root, EVERY_STEP, *overrides), root / "traces.jsonl", out)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_behind_a_damaged_checkpoint_the_one_before_goes_on(root, tmp_path, monkeypatch, caplog, damage):
    stopped(root, tmp_path, monkeypatch, 3)
    newest = tmp_path / "work" / CHECKPOINT_NAME
    newest.write_bytes(damage(newest.read_bytes()))
    with caplog.at_level(logging.INFO):
        train(config_for(root), root / "traces.jsonl", tmp_path)
    assert "can't be read" in caplog.text and "resuming at step 2" in caplog.text
    whole, resumed = (load_file(out / "model.safetensors") for out in (root / "whole", tmp_path))
    assert all(whole[name].equal(resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "work" / "train_log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_no_readable_checkpoint_is_said_with_both_names(tmp_path):
    for name in (CHECKPOINT_NAME, PREVIOUS_NAME):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{CHECKPOINT_NAME} can't be read.*{PREVIOUS_NAME} can't be read.*delete"):
        load_checkpoint(tmp_path, {})


def test_a_flipped_byte_in_a_checkpoint_is_noticed(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"identity": {}, "weights": torch.full((4096,), float(step))})
    path = tmp_path / CHECKPOINT_NAME
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    loaded = load_checkpoint(tmp_path, {})
    assert loaded is not None and loaded["weights"].unique().tolist() == [1.0]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save_checkpoint(tmp_path, {"identity": {}, "step": 1})
    (tmp_path / CHECKPOINT_NAME).replace(tmp_path / PREVIOUS_NAME)
    assert load_checkpoint(tmp_path, {}) == {"identity": {}, "step": 1}


def test_a_checkpoint_of_other_settings_names_them(root, tmp_path, monkeypatch):
    stopped(root, tmp_path, monkeypatch, 1)
    other = config_for(root, "train.epochs=4", "head.num_speculative_tokens=2")
    with pytest.raises(ValueError, match="other settings") as caught:
        train(other, root / "traces.jsonl", tmp_path)
    assert "head.num_speculative_tokens: 3 there, 2 here" in str(caught.value)
    assert "train.epochs: 3 there, 4 here" in str(caught.value) and "learning_rate" not in str(caught.value)


def test_a_finished_head_of_other_settings_names_them(root):
    differing = r"train.learning_rate: 0.00[12] there, 0.5 here; train.window_tokens: 2048 there, 64 here"
    with pytest.raises(ValueError, match=rf"other settings or rows \({differing}\)"):
        train(
            config_for(root, "train.learning_rate=0.5", "train.window_tokens=64"), root / "traces.jsonl", root / "whole"
        )
    with pytest.raises(ValueError, match=r"other settings or rows \(init_head.weights_sha256\)"):
        train(config_for(root, f"train.init_head={root / 'whole'}"), root / "traces.jsonl", root / "whole")


def test_settings_of_place_and_memory_are_no_others(root):
    features = ["train.feature_cache_gib=1.0", f"train.feature_cache_dir={root / 'features'}"]
    config = config_for(root, EVERY_STEP, "train.accumulation_steps=2", *features)
    assert train(config, root / "traces.jsonl", root / "whole").provenance["num_processes"] == 1


def test_long_values_are_named_and_not_shown():
    assert differences({"rows.train": "a", "train.seed": 0}, {"rows.train": "b", "train.seed": 0}) == "rows.train"
    assert differences("an older form", {"train.seed": 0}) == "it does not say which: an earlier version wrote it"


def poison(monkeypatch, step: int, what: str) -> None:
    """At this step the loss or one gradient is no number."""
    compute, calls = GradientMaker.run, []

    def run(self, rows, wishes):
        figures = compute(self, rows, wishes)
        calls.append(rows)
        if len(calls) == step and what == "loss":
            return replace(figures, loss=float("nan"))
        if len(calls) == step:
            next(self.head.parameters()).grad.view(-1)[0] = float("inf")
        return figures

    monkeypatch.setattr(GradientMaker, "run", run)


@pytest.mark.parametrize(
    ("what", "said"), [("loss", "the loss became nan"), ("gradient", "the gradient's norm became")]
)
def test_what_is_no_number_stops_the_run_before_it_reaches_the_weights(root, tmp_path, monkeypatch, what, said):
    with monkeypatch.context() as patch:
        poison(patch, 3, what)
        with pytest.raises(ValueError, match=rf"{said}.* at step 3 \(rows .+\); the checkpoint of step 2 is kept"):
            train(config_for(root, EVERY_STEP), root / "traces.jsonl", tmp_path)
    saved = torch.load(tmp_path / "work" / CHECKPOINT_NAME, weights_only=True)
    assert saved["state"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in saved["weights"].values())
    train(config_for(root), root / "traces.jsonl", tmp_path)  # the disturbance was passing: it ends as if nothing was
    whole, resumed = (load_file(out / "model.safetensors") for out in (root / "whole", tmp_path))
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_learning_rate_that_explodes_is_said_in_one_line(root, tmp_path):
    with pytest.raises(ValueError, match=r"became (nan|inf).*lower train.learning_rate"):
        train(config_for(root, "train.learning_rate=1e38"), root / "traces.jsonl", tmp_path)


@pytest.mark.parametrize("override", ["train.accumulation_steps=0", "train.parallel=zero", "train.precision=fp8"])
def test_settings_are_refused_before_any_feature_is_computed(root, tmp_path, override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        train(config_for(root, override), root / "traces.jsonl", tmp_path)
    assert not (tmp_path / "work").exists()


def test_prompts_are_not_answered_in_several_processes(root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="run `specdec prepare` first"):
        train(config_for(root), None, tmp_path)


def test_the_log_has_a_line_for_every_step(root):
    lines = [json.loads(line) for line in (root / "whole" / "work" / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {"loss", "learning_rate", "tok_per_sec", "top1_rates", "acceptance_length"} <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["tok_per_sec"] > 0
    assert lines[0]["acceptance_length"] is None and lines[-1]["acceptance_length"] >= 1


def test_the_log_of_a_killed_run_is_cut_back_to_its_checkpoint(tmp_path):
    text = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo'
    (tmp_path / "train_log.jsonl").write_text(text)
    log = TrainLog(tmp_path, num_steps_done=1, tensorboard=False)
    log.write(2, loss=2.5)
    log.close()
    lines = (tmp_path / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, log_dir: str, purge_step: int) -> None:
            seen.append((Path(log_dir).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    seen: list = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = TrainLog(tmp_path, num_steps_done=4, tensorboard=True)
    log.write(5, loss=2.5, top1_rates=[0.5], acceptance_length=None)
    log.close()
    assert seen == [("tensorboard", 5), ("train/loss", 2.5, 5), "closed"]


def test_tensorboard_events_are_written(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("the tensorboard package is not installed")
    log = TrainLog(tmp_path, num_steps_done=0, tensorboard=True)
    log.write(1, loss=2.5)
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_without_tensorboard_the_run_does_not_begin(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'specdec\[train-logs\]'"):
        require_tensorboard()
    with pytest.raises(ValueError, match="needs the tensorboard package"):
        train(config_for(root, "train.tensorboard=true"), root / "traces.jsonl", tmp_path)
    assert not tmp_path.joinpath("rows").exists()
