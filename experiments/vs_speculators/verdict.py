"""``python experiments/vs_speculators/verdict.py WORK``: what each side's head accepts, and what training it took."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from experiments.vs_speculators.sides import NAMES
from specdec.doctor.files import HeadFiles
from specdec.metrics import bootstrap_ci95
from specdec.record import write_json_atomic

OUT = Path(__file__).with_name("result.json")
NOTES = [
    "train_sec and train_tok_per_sec are of training steps; process_sec also holds start, validation and checkpoints",
    "both libraries read the target's features from files, made beforehand and counted for neither",
    "specdec keeps the weights of the highest acceptance on the held-out rows, the rival those of its lowest "
    "validation loss on the same rows",
    "acceptance_ratio is the arm's acceptance length over specdec's, by prompt",
]


LAID_BESIDE = ("embed_tokens.weight", "d2t", "t2d")  # the target's embeddings and the token map: not the head's own
BUDGET_SPREAD = 1.1  # longest over shortest training, beyond which the budgets were not the same


def verdict(
    result: dict[str, Any],
    trained: dict[str, dict[str, Any]],
    heads: dict[str, HeadFiles],
    rival_environment: list[str],
) -> dict[str, Any]:
    """One entry an arm, of the greedy cell; ``trained`` is what ``train.py`` wrote of each.

    Raises:
        ValueError: the heads are not of one size and draft vocabulary, or the measurement was stopped.
    """
    if result["interrupted"]:
        raise ValueError("the measurement was stopped before its end; the same command goes on from there")
    [cell] = result["cells"]
    sizes = {name: num_parameters(head) for name, head in heads.items()}
    if len(set(sizes.values())) > 1 or len({tuple(head.integers("d2t") or ()) for head in heads.values()}) > 1:
        raise ValueError(f"the heads are not alike in size ({sizes}) or draft vocabulary: no fair comparison")
    arms = []
    for name in NAMES:
        acceptance = cell["arms"][name]["acceptance"]
        compared = cell["comparisons"].get(name, {})
        arms.append(
            {
                "name": name,
                "acceptance_length": acceptance["acceptance_length"],
                "ci95": acceptance_ci95([row for row in result["requests"] if row["arm"] == name]),
                "per_position_rates": acceptance["per_position_rates"],
                "acceptance_ratio_mean": compared.get("acceptance_ratio_mean"),
                "acceptance_ratio_ci95": compared.get("acceptance_ratio_ci95"),
                "num_parameters": sizes[name],
                **{key: value for key, value in trained[name].items() if key != "name"},
            }
        )
    return {
        "arms": arms,
        "num_prompts": len({row["item_id"] for row in result["requests"]}),
        "greedy_identity_rate": {row["arm"]: row["greedy_identity_rate"] for row in result["losslessness"]["greedy"]},
        "notes": [*NOTES, *budget_notes(arms), *result["notes"]],
        "rival_environment": rival_environment,
        "provenance": result["provenance"],
    }


def num_parameters(head: HeadFiles) -> int:
    """Of the head itself."""
    return sum(math.prod(entry.shape) for name, entry in head.tensors.items() if name not in LAID_BESIDE)


def budget_notes(arms: list[dict[str, Any]]) -> list[str]:
    """Says so when the sides did not train equally long, because the machine was not as it was in the short run."""
    seconds = {arm["name"]: arm["train_sec"] for arm in arms}
    if max(seconds.values()) <= BUDGET_SPREAD * min(seconds.values()):
        return []
    told = ", ".join(f"{name} {sec:.0f} s" for name, sec in seconds.items())
    return [f"the sides trained unequally long ({told}): the machine was not quiet, or an epoch is much of the budget"]


def acceptance_ci95(requests: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Of the acceptance length; a prompt is drawn with all its drafts."""
    pairs = [(row["num_drafts"], row["num_accepted_tokens"]) for row in requests if row["num_drafts"]]
    return bootstrap_ci95(pairs, statistic=lambda drawn: 1 + sum(a for _, a in drawn) / sum(d for d, _ in drawn))


def main() -> None:
    work = Path(sys.argv[1])
    environment = Path(__file__).with_name("requirements.txt").read_text().splitlines()
    found = verdict(
        json.loads((work / "eval" / "result.json").read_text()),
        {name: json.loads((work / name / "arm.json").read_text()) for name in NAMES},
        {name: HeadFiles.read(work / name / "head") for name in NAMES},
        [line for line in environment if "==" in line],
    )
    write_json_atomic(OUT, found)
    shown = ("name", "acceptance_length", "ci95", "train_tok_per_sec", "peak_memory_bytes", "train_sec")
    print(json.dumps([{key: arm[key] for key in shown} for arm in found["arms"]]))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
