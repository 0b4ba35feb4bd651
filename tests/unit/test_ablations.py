"""The ablation on a tiny target from end to end, and what it calls a gain."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from draft_training.prepare import prepare
from draft_training.row_store import load_rows
from experiments.ablations import ablate
from experiments.ablations.arms import ARMS, ArmRun, arm_config, split
from experiments.ablations.verdict import judge, markdown
from specdec.config import load_config
from tests.tiny import save_tiny_target


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ablations")
    save_tiny_target(root / "target")
    items = [{"problem": f"{i}+{i}?", "reasoning": f"twice {i}", "response": str(2 * i)} for i in range(12)]
    (root / "traces.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    overrides = [f"target.name={root / 'target'}", "traces.val_fraction=0.25"]
    config = load_config(None, overrides)
    config.traces.files = [str(root / "traces.jsonl")]
    prepare(config, root / "rows")
    return root


def run(workspace: Path, out: Path, *arguments: str) -> int:
    settings = [f"target.name={workspace / 'target'}", "train.epochs=1", "train.batch_tokens=256"]
    options = [word for setting in settings for word in ("--set", setting)]
    paths = ["--work", str(out / "work"), "--out", str(out)]
    return ablate.main([str(workspace / "rows"), *options, *paths, *arguments])


def test_finished_runs_are_kept_and_the_rest_goes_on(workspace, tmp_path, monkeypatch, capsys):
    arms = ("--arms", "default", "weights-survival", "unrolled-deeper")
    assert run(workspace, tmp_path, *arms, "--seeds", "1") == 0
    trained = []
    original = ablate.train_arm
    monkeypatch.setattr(ablate, "train_arm", lambda b, arm, *rest: trained.append(arm) or original(b, arm, *rest))
    assert run(workspace, tmp_path, *arms, "--seeds", "2") == 0
    assert trained == list(arms[1:])  # the second seed alone
    tree = json.loads((tmp_path / "result.json").read_text())
    assert [(row["arm"], row["num_seeds"]) for row in tree["arms"]] == [(arm, 2) for arm in arms[1:]]
    assert len(tree["arms"][2]["per_position_rates"]) == 3  # trained five deep, measured as the others
    assert "optimizer-adamw" in tree["missing"] and tree["winner"] is None
    assert (tmp_path / "result.md").read_text() in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "work").iterdir() if path.is_dir()] == []
    assert run(workspace, tmp_path, *arms, "--seeds", "1", "--set", "train.learning_rate=0.1") == 2
    assert "other settings" in capsys.readouterr().err


def test_no_run_begins_after_the_time_is_up(workspace, tmp_path, capsys):
    assert run(workspace, tmp_path, "--minutes", "0") == 2
    assert "0 minutes are up before default, seed 0" in capsys.readouterr().err


def test_rows_of_another_target_and_missing_rows_are_refused(workspace, tmp_path, capsys):
    save_tiny_target(tmp_path / "other", "qwen2")
    assert run(workspace, tmp_path, "--set", f"target.name={tmp_path / 'other'}") == 2
    assert "rows of another target" in capsys.readouterr().err
    assert ablate.main([str(tmp_path)]) == 2
    assert "holds no rows" in capsys.readouterr().err


def test_every_arm_flips_something_and_the_split_parts_no_prompt(workspace):
    default = arm_config("default", 0, [])
    assert all(arm_config(arm, 0, []) != default for arm in ARMS if arm != "default")
    rows = [*load_rows(workspace / "rows" / "train"), *load_rows(workspace / "rows" / "val")]
    doubled = split([*rows, *rows])
    assert len(doubled["val"]) == 2 * 3 and len(doubled["train"]) == 2 * 9
    assert not {row.prompt for row in doubled["val"]} & {row.prompt for row in doubled["train"]}


def made_run(arm: str, seed: int, rate: float) -> ArmRun:
    """Forty conversations of thirty drafts, each token accepted with ``rate``; noise of seeds and of conversations."""
    rng = random.Random(f"{arm}{seed}")
    luck = rng.gauss(0, 0.003)
    accepted = {}
    for name in map(str, range(40)):
        share = rate + luck + 0.1 * random.Random(name).random()
        accepted[name] = [next((i for i in range(3) if rng.random() > share), 3) for _ in range(30)]
    drafts = [count for conversation in accepted.values() for count in conversation]
    return ArmRun(
        arm=arm,
        seed=seed,
        identity="",
        train_sec=1.0,
        num_steps=1,
        draft_vocab_size=1,
        acceptance_length=1 + sum(drafts) / len(drafts),
        per_position_rates=[sum(count > i for count in drafts) / len(drafts) for i in range(3)],
        accepted_by_conversation=accepted,
    )


def test_a_planted_gain_wins_a_loss_is_named_and_nothing_is_found_where_nothing_is():
    rates = {"default": 0.5, "ema": 0.56, "optimizer-adamw": 0.59, "lm-head-frozen": 0.4, "lm-head-slow": 0.5}
    found = judge([made_run(arm, seed, rate) for arm, rate in rates.items() for seed in range(3)])
    verdicts = {row["arm"]: row["verdict"] for row in found["arms"]}
    assert verdicts == {
        "default": "default",
        "ema": "gain",
        "optimizer-adamw": "gain",
        "lm-head-frozen": "loss",
        "lm-head-slow": "no difference shown",
    }
    assert found["winner"] == "optimizer-adamw"
    for row in found["arms"][1:]:
        assert row["difference_ci95"][0] < row["difference"] < row["difference_ci95"][1]
    assert "**optimizer-adamw** (`train.optimizer=adamw`) wins" in markdown(found)


def test_one_seed_is_never_called_a_gain():
    found = judge([made_run("default", 0, 0.4), made_run("ema", 0, 0.7)])
    assert found["winner"] is None and found["arms"][1]["verdict"] == "no difference shown"
    assert "No switch beats the default" in markdown(found)
