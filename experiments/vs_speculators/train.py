"""``python experiments/vs_speculators/train.py ROWS MINUTES WORK``: time the sides, train them in turn, export.

Each stage that is complete is skipped when the command is given again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.vs_speculators.sides import (
    DEFAULT,
    DRAFT_VOCAB_SIZE,
    HERE,
    NAMES,
    NUM_SPECULATIVE_TOKENS,
    OWN,
    rows_card,
    side,
)
from experiments.vs_speculators.turns import Side, take_turns
from specdec.config import RunConfig
from specdec.manifest import HeadManifest
from specdec.record import provenance, write_json_atomic
from specdec.targets import resolve_target

PILOT_SEC = 20.0  # of training steps, to learn how many epochs fit
WARM_UP_STEPS = 2  # of a process: they set up its memory
TURN_SEC = 20.0
PILOT_EPOCHS = 1000  # never reached


def make_dataset(rows: Path, data: Path) -> None:
    """Rows and features for the rival, in a process of its own: this one stays small."""
    if (data / "pilot" / "card.json").is_file():
        return
    subprocess.run([sys.executable, str(HERE / "dataset.py"), str(rows), str(data)], check=True)


def fitting_epochs(rows: Path, data: Path, minutes: float, work: Path) -> dict[str, float]:
    """How many epochs of ``rows`` each side trains in about ``minutes``, by a short run of all in turn.

    The rival knows whole epochs only, so the time is what its default needs for the whole number that comes nearest.
    """
    path = work / "pilot.json"
    if not path.is_file():
        pilot = {
            name: side(name, work / "pilot" / name, data / "pilot" if name == OWN else rows, data, PILOT_EPOCHS)
            for name in NAMES
        }
        shutil.rmtree(work / "pilot", ignore_errors=True)
        take_turns(list(pilot.values()), PILOT_SEC / 2, PILOT_SEC, "how fast each trains", enough=_is_timed)
        speeds = {name: _tok_per_sec(each.steps()[WARM_UP_STEPS:]) for name, each in pilot.items()}
        write_json_atomic(path, speeds)
        shutil.rmtree(work / "pilot")
    num_tokens = rows_card(rows)["splits"]["train"]["tokens"]
    speeds = json.loads(path.read_text())
    sec = max(1, round(minutes * 60 * speeds[DEFAULT] / num_tokens)) * num_tokens / speeds[DEFAULT]
    fitting = {name: sec * speeds[name] / num_tokens for name in NAMES}
    return {name: round(epochs, 2) if name == OWN else max(1, round(epochs)) for name, epochs in fitting.items()}


def _is_timed(each: Side) -> bool:
    return each.trained_sec >= PILOT_SEC and len(each.steps()) >= WARM_UP_STEPS + 5


def _tok_per_sec(steps: list[tuple[float, int]]) -> float:
    return sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps)


def train_sides(rows: Path, data: Path, minutes: float, work: Path, epochs: dict[str, float]) -> None:
    """Train what is not trained yet, from its beginning; writes ``NAME/arm.json``."""
    missing = [name for name in NAMES if not (work / name / "arm.json").is_file()]
    for name in missing:
        shutil.rmtree(work / name, ignore_errors=True)
    sides = [side(name, work / name, rows, data, epochs[name]) for name in missing]
    take_turns(sides, TURN_SEC, minutes * 60, f"training {len(sides)} sides in turn")
    for each in sides:
        facts = export_rival(each, epochs[each.name]) if each.name != OWN else own_facts(each.folder / "head")
        write_json_atomic(each.folder / "arm.json", {**measured(each), "epochs": epochs[each.name], **facts})


def measured(each: Side) -> dict[str, Any]:
    steps = each.steps()
    return {
        "name": each.name,
        "train_tok_per_sec": _tok_per_sec(steps),
        "train_sec": each.trained_sec,
        "process_sec": each.process_sec,
        "peak_memory_bytes": each.peak_memory_bytes,
        "num_steps": len(steps),
        "num_tokens": sum(tokens for _, tokens in steps),
        "command": " ".join(Path(word).name if Path(word).is_absolute() else word for word in each.command),
    }


def own_facts(head: Path) -> dict[str, Any]:
    manifest = HeadManifest.load(head)
    return {
        "held_out_acceptance_length": manifest.acceptance["acceptance_length"],
        "best_step": manifest.provenance["best_step"],
        "history": manifest.provenance["history"],
    }


def export_rival(each: Side, num_epochs: float) -> dict[str, Any]:
    """Its checkpoint of the lowest validation loss as a head that ``specdec serve`` takes."""
    checkpoints, head = each.folder / "checkpoints", each.folder / "head"
    best = (checkpoints / "checkpoint_best").resolve()
    head.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(best / name, head / name)
    target = resolve_target(RunConfig().target)
    manifest = HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
        target_name=target.name,
        target=target.fingerprint(),
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        provenance=provenance(trained_by="speculators"),
    )
    manifest.save(head)
    history = [
        {"epoch": epoch + 1, **_validation(json.loads(path.read_text()))}
        for epoch in range(round(num_epochs))
        if (path := checkpoints / str(epoch) / "val_metrics.json").is_file()  # written where the loss fell
    ]
    shutil.rmtree(checkpoints)
    return {"best_epoch": int(best.name) + 1, "history": history}


def _validation(metrics: dict[str, float]) -> dict[str, Any]:
    rates = [metrics[f"full_acc_{i}_epoch"] for i in range(NUM_SPECULATIVE_TOKENS)]
    return {"loss": metrics["loss_epoch"], "per_position_rates": rates}


def main() -> None:
    rows, minutes, work = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    settings = {"minutes": minutes, "rows": rows_card(rows)["splits"]["train"]["input_ids_sha256"]}
    path = work / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{work} holds a run of other rows: delete it, or name another folder")
    write_json_atomic(path, settings)
    data = work / "data"
    make_dataset(rows, data)
    train_sides(rows, data, minutes, work, fitting_epochs(rows, data, minutes, work))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
