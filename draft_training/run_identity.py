"""What decides a run's weights: a checkpoint or a finished head belongs to these settings and rows alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from draft_training.warm_start import digest_of
from specdec.config import RunConfig
from specdec.targets import Target

# Where and how fast it is computed; the weights stay the same, up to rounding.
PLACE_ONLY = (
    "accumulation_steps", "checkpoint_activations", "checkpoint_every_sec", "feature_cache_dir", "feature_cache_gib",
    "parallel", "tensorboard",
)  # fmt: skip


def run_identity(config: RunConfig, card: dict[str, Any], target: Target) -> dict[str, Any]:
    """By name, everything that another run would have to share; survives JSON."""
    skipped = {*PLACE_ONLY, "init_head"}  # of the head to start from, its weights count and not where they lie
    train = {key: value for key, value in dataclasses.asdict(config.train).items() if key not in skipped}
    init_head = config.train.init_head
    sections = {
        "head": dataclasses.asdict(config.head),
        "train": train,
        "init_head": {"weights_sha256": None if init_head is None else digest_of(Path(init_head))},
        "target": dataclasses.asdict(target.fingerprint()),
        "rows": {name: split["input_ids_sha256"] for name, split in card["splits"].items()},
    }
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return json.loads(json.dumps(flat))


def differences(there: Any, here: dict[str, Any]) -> str:
    """The names of what differs, with the values that a person can compare."""
    if not isinstance(there, dict):
        return "it does not say which: an earlier version wrote it"
    named = []
    for key in [*here, *(key for key in there if key not in here)]:
        old, new = there.get(key), here.get(key)
        if old != new:
            comparable = key.startswith(("head.", "train."))
            named.append(f"{key}: {_shown(old)} there, {_shown(new)} here" if comparable else key)
    return "; ".join(named)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else json.dumps(value)
