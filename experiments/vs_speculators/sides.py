"""The three sides: what each is told. What is not told here is its own default.

All train one Llama layer on the same rows, the same three tapped layers and the same draft vocabulary, for as long,
in batches of as many tokens: specdec's default, for the rival's own of 8,192 would leave it 40 steps of minutes. Its
tuned side makes twice as many steps of half the size.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from draft_training.heads.eagle3.config import Eagle3Options
from draft_training.prepare import CARD_NAME
from experiments.vs_speculators.turns import Side
from specdec.config import RunConfig
from specdec.targets import resolve_target

HERE = Path(__file__).parent
OWN, DEFAULT, TUNED = "specdec", "speculators_default", "speculators_tuned"
RIVALS: dict[str, list[str]] = {
    # A window of 2,048 tokens, KL divergence, three unrolled steps, Muon at 1e-3, linear to zero.
    DEFAULT: [],
    TUNED: ["--full-attention-indices", "0", "--loss-fn", "lk_hybrid", "--ttt-steps", "3"],
}
NAMES = [OWN, *RIVALS]
NUM_SPECULATIVE_TOKENS = 3
DRAFT_VOCAB_SIZE = 2048
BATCH_TOKENS = {OWN: 1024, DEFAULT: 1024, TUNED: 512}
FEATURE_CACHE_GIB = 8
RIVAL_PYTHON = Path("runs/vs_speculators/venv/bin/python")


def rows_card(rows: Path) -> dict[str, Any]:
    """The data card of rows.

    Raises:
        ValueError: ``rows`` is no finished directory of ``specdec prepare``.
    """
    path = rows / CARD_NAME
    if not path.is_file():
        raise ValueError(f"{rows} holds no {CARD_NAME}: make rows with `specdec prepare --out {rows}`, or `make demo`")
    return json.loads(path.read_text())


def side(name: str, folder: Path, rows: Path, data: Path, num_epochs: float) -> Side:
    """The training process of ``name``; both libraries get all cores."""
    known = folder, rows, data, num_epochs
    command = _own(*known) if name == OWN else _rival(name, *known)
    environment = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return Side(name=name, command=command, folder=folder, environment=environment)


def _own(folder: Path, rows: Path, data: Path, num_epochs: float) -> list[str]:
    command = [sys.executable, str(HERE / "own.py"), "MARKS", "train", "--head", "eagle3"]
    settings = {
        "head.num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "head.options.draft_vocab_size": DRAFT_VOCAB_SIZE,
        "train.epochs": num_epochs,
        "train.batch_tokens": BATCH_TOKENS[OWN],
        "train.feature_cache_dir": data / "features",
        "train.feature_cache_gib": FEATURE_CACHE_GIB,
    }
    command += ["--traces", str(rows), "--out", str(folder / "head")]
    return command + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def _rival(name: str, folder: Path, rows: Path, data: Path, num_epochs: float) -> list[str]:
    target, splits = resolve_target(RunConfig().target), rows_card(rows)["splits"]
    num_train, num_held_out = splits["train"]["rows"], splits["val"]["rows"]
    options = {
        "--speculator-type": "eagle3",
        "--verifier-name-or-path": str(target.path),
        "--data-path": str(data),
        "--save-path": str(folder / "checkpoints"),
        "--draft-vocab-size": str(DRAFT_VOCAB_SIZE),
        "--total-seq-len": str(max(BATCH_TOKENS[name], splits["train"]["length_max"])),
        "--train-data-ratio": str((num_train + 0.5) / (num_train + num_held_out)),  # it rounds down
        "--epochs": str(round(num_epochs)),
        # What it needs on a CPU, where its own defaults have no kernels. It computes in bf16, as specdec does where the
        # CPU can.
        "--draft-attn-impl": "sdpa",
        "--loss-implementation": "eager",
        "--num-workers": "0",
        "--on-missing": "raise",
    }
    layers = Eagle3Options().resolve_aux_layer_ids(int(target.config["num_hidden_layers"]))
    command = [str(RIVAL_PYTHON), str(HERE / "rival.py"), "MARKS", "train", "--no-resume-from-checkpoint"]
    command += ["--target-layer-ids", *map(str, layers)]
    return command + [word for option in options.items() for word in option] + RIVALS[name]
