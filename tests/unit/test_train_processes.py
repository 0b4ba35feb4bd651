"""Training in several processes, in parts and in pieces of time: the same run, up to rounding or to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draft_training.distributed import cut, home_of, share_out
from draft_training.train import train
from specdec.config import load_config
from specdec.manifest import HeadManifest
from tests.tiny import save_tiny_target

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "train.epochs=3", "train.batch_tokens=160", "head.options.draft_vocab_size=64", "traces.val_fraction=0.25",
    "train.num_evals=2", "train.precision=fp32", "train.optimizer=adamw",
]  # fmt: skip
EVERY_STEP = ["train.checkpoint_every_sec=0.0"]
RECIPE = [
    "train.optimizer=muon", "train.ema=0.5", "train.loss=lk_hybrid", "train.position_weights=survival",
    "train.lm_head_lr_scale=0", "train.window_tokens=8",
]  # fmt: skip
AVERAGED = "train.ema=0.5"


def arguments(root: Path, out: str, *overrides: str) -> list[str]:
    settings = [f"--set={item}" for item in [*SETTINGS, *overrides]]
    return [
        "--target",
        str(root / "target"),
        "--traces",
        str(root / "traces.jsonl"),
        "--out",
        str(root / out),
        *settings,
    ]


def train_alone(root: Path, out: str, *overrides: str) -> HeadManifest:
    config = load_config(None, [f"target.name={root / 'target'}", *SETTINGS, *overrides])
    return train(config, root / "traces.jsonl", root / out)


def log_of(root: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (root / out / "work" / "train_log.jsonl").read_text().splitlines()]


def losses_of(root: Path, out: str) -> list[float]:
    return [line["loss"] for line in log_of(root, out)]


def assert_same_trajectory(root: Path, out: str) -> None:
    """As the run of one process went: rounding at first, later what AdamW makes of it where gradients are near zero."""
    expected, found = losses_of(root, "alone"), losses_of(root, out)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)


def weights_of(root: Path, out: str) -> dict[str, torch.Tensor]:
    return load_file(root / out / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny target, traces, and ``alone``: one process, every step in one part."""
    root = tmp_path_factory.mktemp("processes")
    save_tiny_target(root / "target")
    items = [
        {"problem": f"{i}+{i}?", "reasoning": f"twice {i}" * (1 + i % 3), "response": str(2 * i)} for i in range(16)
    ]
    (root / "traces.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    train_alone(root, "alone")
    return root


@pytest.fixture(scope="module")
def ended(root) -> dict[str, list[dict]]:
    """All runs in two processes, started once: imports cost more than these runs."""

    def job(name: str, out: str, *overrides: str, at: tuple[int, int, str] | None = None) -> dict:
        return {"name": name, "arguments": arguments(root, out, *overrides), "num_processes": 2, "at": at}

    sharded = ["train.parallel=fsdp", "train.accumulation_steps=2", "train.checkpoint_activations=true", AVERAGED]
    warm = [*RECIPE, f"train.init_head={root / 'alone'}", f"train.feature_cache_dir={root / 'features'}"]
    jobs = [
        job("two", "two", *EVERY_STEP),
        job("killed", "cut", *EVERY_STEP, at=(1, 8, "SIGKILL")),
        job("resumed", "cut", *EVERY_STEP),
        job("stopped", "sharded", *sharded, at=(1, 5, "SIGINT")),
        job("continued", "sharded", *sharded),
        job("full", "full", *EVERY_STEP, at=(0, 3, "disk full")),
        job("warm", "warm", *warm),
        job("other", "two", "train.epochs=4"),
        job("refused", "refused", "train.parallel=fsdp", "train.optimizer=muon"),
    ]
    command = [sys.executable, "tests/ranks.py", json.dumps(jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_train_as_one_does(root, ended):
    assert [end["code"] for end in ended["two"]] == [0, 0], ended["two"]
    assert_same_trajectory(root, "two")
    assert losses_of(root, "two") != losses_of(root, "alone")  # or one process did all the work
    alone, two = HeadManifest.load(root / "alone"), HeadManifest.load(root / "two")
    assert (alone.provenance["num_processes"], two.provenance["num_processes"]) == (1, 2)
    assert two.acceptance["num_drafts"] == pytest.approx(alone.acceptance["num_drafts"], rel=0.1)
    assert sorted(two.acceptance_by_prompt) == sorted(alone.acceptance_by_prompt)
    along = [each["num_drafts"] for each in two.acceptance["by_output_position"]]
    assert sum(along) == two.acceptance["num_drafts"]
    for name, weights in weights_of(root, "alone").items():
        torch.testing.assert_close(weights_of(root, "two")[name], weights, rtol=0.02, atol=2e-3, msg=name)


def test_the_first_process_speaks_for_all(ended):
    first, second = ended["two"]
    assert json.loads(first["stdout"])["acceptance_length"] >= 1
    assert "held-out acceptance" in first["stderr"]
    assert second["stdout"] == second["stderr"] == ""


def test_killed_in_one_process_it_ends_and_resumes_to_the_same_bits(root, ended):
    first, second = ended["killed"]
    assert second["code"] == -9
    assert first["code"] == 2 and "another process of this run is gone" in first["stderr"].splitlines()[-1]
    assert "Traceback" not in first["stderr"]
    assert [end["code"] for end in ended["resumed"]] == [0, 0], ended["resumed"]
    assert "resuming at step 7" in ended["resumed"][0]["stderr"]
    assert [line["step"] for line in log_of(root, "cut")] == [line["step"] for line in log_of(root, "two")]
    assert losses_of(root, "cut") == losses_of(root, "two")
    cut_weights, whole_weights = weights_of(root, "cut"), weights_of(root, "two")
    assert all(whole_weights[name].equal(cut_weights[name]) for name in whole_weights)


def test_interrupted_in_one_process_all_stop_and_shards_resume(root, ended):
    assert [end["code"] for end in ended["stopped"]] == [2, 2], ended["stopped"]
    assert "run the same command to continue" in ended["stopped"][0]["stderr"].splitlines()[-1]
    assert [end["code"] for end in ended["continued"]] == [0, 0], ended["continued"]
    assert "resuming at step 5" in ended["continued"][0]["stderr"]
    assert_same_trajectory(root, "sharded")
    train_alone(root, "averaged", AVERAGED)
    for name, weights in weights_of(root, "averaged").items():
        torch.testing.assert_close(weights_of(root, "sharded")[name], weights, rtol=0.02, atol=2e-3, msg=name)
    # What shards wrote is whole: one process takes it up.
    saved = torch.load(root / "sharded" / "work" / "checkpoint.pt", weights_only=True)
    alone = torch.load(root / "averaged" / "work" / "checkpoint.pt", weights_only=True)
    for name, tensor in alone["weights"].items():
        average = alone["average"]["averages"][name]
        assert not average.equal(tensor)
        torch.testing.assert_close(saved["weights"][name], tensor, rtol=0.02, atol=2e-3, msg=name)
        torch.testing.assert_close(saved["average"]["averages"][name], average, rtol=0.02, atol=2e-3, msg=name)
    moments = [state["exp_avg"] for state in saved["optimizer"]["state"].values()]
    assert [m.shape for m in moments] == [s["exp_avg"].shape for s in alone["optimizer"]["state"].values()]


def test_a_recipe_a_head_to_start_from_and_features_on_disk_are_shared(root, ended):
    assert [end["code"] for end in ended["warm"]] == [0, 0], ended["warm"]
    files = {path: path.stat().st_mtime_ns for path in (root / "features").rglob("*.safetensors")}
    assert len(files) == 2 * 2  # splits; of this shallow target, one layer and the last hidden state
    warm = [*RECIPE, f"train.init_head={root / 'alone'}"]
    train_alone(root, "warm alone", *warm, f"train.feature_cache_dir={root / 'features'}")
    assert {path: path.stat().st_mtime_ns for path in (root / "features").rglob("*.safetensors")} == files
    assert losses_of(root, "warm") == pytest.approx(losses_of(root, "warm alone"), rel=1e-3)
    two = train_alone(root, "warm", *warm)  # complete: neither processes nor where features lie make it another run
    assert two.provenance["num_processes"] == 2 and two.provenance["coverage"]["num_windowed_rows"] > 0
    assert two.provenance["history"][0]["step"] == 0  # the head to start from was measured
    assert weights_of(root, "warm")["lm_head.weight"].equal(weights_of(root, "alone")["lm_head.weight"])


def test_another_run_s_head_is_kept_and_every_process_says_so_in_a_line(ended):
    for end in ended["other"]:
        assert end["code"] == 2 and "Traceback" not in end["stderr"]
        assert "train.epochs: 3 there, 4 here" in end["stderr"].splitlines()[-1]


def test_muon_is_refused_where_matrices_are_in_shards(ended):
    assert [end["code"] for end in ended["refused"]] == [2, 2]
    assert "train.optimizer=muon needs whole matrices" in ended["refused"][0]["stderr"].splitlines()[-1]


def test_an_error_of_one_process_ends_all(ended):
    first, second = ended["full"]
    assert first["code"] == 2 and "the disk is full" in first["stderr"].splitlines()[-1]
    assert second["code"] == 2 and "another process of this run is gone" in second["stderr"].splitlines()[-1]


def test_a_step_in_parts_is_the_same_step(root):
    train_alone(root, "parts", "train.accumulation_steps=3", "train.checkpoint_activations=true")
    assert_same_trajectory(root, "parts")
    assert losses_of(root, "parts") != losses_of(root, "alone")


def test_bf16_keeps_float32_masters_and_moments(root):
    train_alone(root, "bf16", "train.precision=bf16", "train.epochs=1")
    saved = torch.load(root / "bf16" / "work" / "checkpoint.pt", weights_only=True)
    moments = [state[name] for state in saved["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {tensor.dtype for tensor in [*saved["weights"].values(), *moments]} == {torch.float32}
    first = losses_of(root, "bf16")[0]
    assert first == pytest.approx(losses_of(root, "alone")[0], rel=0.02) and first != losses_of(root, "alone")[0]


def test_rows_are_shared_out_evenly_and_stay_at_home_where_they_can():
    rows = [3, 9, 4, 0, 7, 1, 5]
    shares = share_out(rows, 3)
    assert sorted(row for share in shares for row in share) == sorted(rows)
    assert shares == [[3, 9, 0], [4, 7, 1], [5]] and all(home_of(row, 3) == 0 for row in shares[0])
    assert share_out([0, 3, 6, 9, 1], 3) == [[0, 3], [9, 1], [6]]
    assert all([rows.index(row) for row in share] == sorted(rows.index(row) for row in share) for share in shares)
    assert share_out([5], 2) == [[], [5]]
    assert share_out(rows, 1) == [rows]


def test_parts_keep_the_order_and_lose_nothing():
    assert cut([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert cut([1], 3) == [[], [], [1]]


def test_accelerate_starts_the_processes(root):
    """As it starts one for each accelerator: what follows ``--multi_gpu`` needs none."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launcher += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    done = subprocess.run(
        [*launcher, "--main_process_port=0", "-m", "specdec", "train", *arguments(root, "launched")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert HeadManifest.load(root / "launched").provenance["num_processes"] == 2
    assert_same_trajectory(root, "launched")
    assert json.loads(done.stdout)["acceptance_length"] >= 1, "the first process alone answers"
