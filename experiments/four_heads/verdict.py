"""``python experiments/four_heads/verdict.py RUN_DIR PROMPTS``: what each head accepts, and what it gains.

Training's acceptance is given twice: as the manifest has it, on the rows of these prompts, and as training's walk finds
it on the answers that were served. The two texts part where two tokens tie.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from draft_training.exported import acceptance_on
from specdec.config import RunConfig
from specdec.evaluation.acceptance import trained_acceptance
from specdec.evaluation.answers import NAME, Answer, read_answers
from specdec.manifest import HeadManifest
from specdec.metrics import bootstrap_ci95
from specdec.record import text_sha256, write_json_atomic

OUT = Path(__file__).with_name("result.json")


def verdict(result: dict[str, Any], prompts: dict[str, str], on_served: dict[str, float]) -> dict[str, Any]:
    """One row an arm, of the greedy cell; ``prompts`` by item id; ``on_served``: by arm, what training's walk finds."""
    cell = result["cells"][0]
    return {
        "arms": [_row(result, cell, arm, prompts, on_served) for arm in result["arms"]],
        "greedy_identity_rate": {row["arm"]: row["greedy_identity_rate"] for row in result["losslessness"]["greedy"]},
        "notes": result["notes"],
        "provenance": result["provenance"],
    }


def _row(
    result: dict[str, Any],
    cell: dict[str, Any],
    arm: dict[str, Any],
    prompts: dict[str, str],
    on_served: dict[str, float],
) -> dict[str, Any]:
    requests = [
        row
        for row in result["requests"]
        if (row["arm"], row["cell"]) == (arm["name"], cell["name"]) and row["error"] is None
    ]
    figures = cell["arms"][arm["name"]]
    acceptance = figures["acceptance"] or {}
    plain_step_sec = next(cell["arms"][each["name"]]["step_sec_p50"] for each in result["arms"] if each["baseline"])
    compared = cell["comparisons"].get(arm["name"], {})
    row = {
        "name": arm["name"],
        "head": None,
        "acceptance_length": acceptance.get("acceptance_length"),
        "ci95": _interval(requests),
        "trained_acceptance_length": None,
        "trained_on_served_answers": on_served.get(arm["name"]),
        "speedup_median": compared.get("speedup_median"),
        "speedup_ci95": compared.get("speedup_ci95"),
        "tpot_sec_p50": figures["tpot_sec"]["p50"],
        "step_sec_p50": figures["step_sec_p50"],
        # Drafting K tokens and verifying K + 1 at once; what the heads differ by is their own.
        "step_cost_sec": None if arm["baseline"] else figures["step_sec_p50"] - plain_step_sec,
        "per_position_rates": acceptance.get("per_position_rates", []),
    }
    if "head" not in arm["options"]:
        return row
    manifest = HeadManifest.load(Path(arm["options"]["head"]))
    hashes = [text_sha256(prompts[item]) for item in sorted({request["item_id"] for request in requests})]
    trained, _ = trained_acceptance(
        manifest.acceptance_by_prompt, hashes, manifest.num_speculative_tokens, arm["num_speculative_tokens"]
    )
    return {
        **row,
        "head": manifest.head,
        "trained_acceptance_length": trained.acceptance_length if trained else None,
        "trained_per_position_rates": trained.per_position_rates if trained else [],
        "train_sec": manifest.provenance.get("train_sec"),
        "file_bytes": (Path(arm["options"]["head"]) / "model.safetensors").stat().st_size,
    }


def _interval(requests: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Of the acceptance length, a bootstrap over prompts: repeats of a prompt are no new evidence."""
    by_prompt: dict[str, tuple[int, int]] = {}
    for row in requests:
        if row["num_drafts"]:
            drafts, accepted = by_prompt.get(row["item_id"], (0, 0))
            by_prompt[row["item_id"]] = (drafts + row["num_drafts"], accepted + row["num_accepted_tokens"])
    return bootstrap_ci95(list(by_prompt.values()), statistic=_acceptance_length)


def _acceptance_length(pairs: list[tuple[int, int]]) -> float:
    return 1 + sum(accepted for _, accepted in pairs) / sum(drafts for drafts, _ in pairs)


def measured_on_served(result: dict[str, Any], answers: list[Answer]) -> dict[str, float]:
    """By arm with a head: the acceptance length that training's walk finds on the arm's own answers."""
    found = {}
    for arm in result["arms"]:
        if "head" in arm["options"]:
            own = [(each.prompt_token_ids, each.token_ids) for each in answers if each.arm == arm["name"]]
            found[arm["name"]] = acceptance_on(RunConfig(), Path(arm["options"]["head"]), own).acceptance_length or 0.0
    return found


if __name__ == "__main__":
    run_dir, prompt_file = map(Path, sys.argv[1:])
    lines = prompt_file.read_text().splitlines()
    texts = {f"{prompt_file.stem}-{number}": json.loads(line)["prompt"] for number, line in enumerate(lines)}
    measured = json.loads((run_dir / "result.json").read_text())
    found = verdict(measured, texts, measured_on_served(measured, read_answers(run_dir / NAME)))
    write_json_atomic(OUT, found)
    print(
        json.dumps(
            [
                {
                    key: arm[key]
                    for key in (
                        "name",
                        "acceptance_length",
                        "trained_on_served_answers",
                        "step_cost_sec",
                        "speedup_median",
                    )
                }
                for arm in found["arms"]
            ]
        )
    )
