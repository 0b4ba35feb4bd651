"""Does the served head accept what training said it would? The one check that needs a server."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from specdec.config import RunConfig
from specdec.doctor.findings import Finding

MAX_DIFFERENCE = 0.03  # of the served acceptance length
CARD_NAME = "card.json"  # of the rows, beside their prompts


def check_parity(config: RunConfig, head_dir: Path, prompts: Path | None) -> list[Finding]:
    """Serve the head on vLLM, decode its held-out prompts as their rows were decoded, and compare acceptance lengths.

    Sampled answers differ from run to run: there, chance is allowed for on top (two standard errors, at the most that a
    draft's count can vary).

    Raises:
        ValueError: no prompts, none that training measured, or rows whose text is not the target's own; or the head
            can't be served.
    """
    from specdec.evaluation.run import evaluate

    if prompts is None:
        raise ValueError("--parity needs the prompts that training held out: --prompts ROWS/val_prompts.jsonl")
    temperature, max_new_tokens = _decoding(prompts)
    settings = dataclasses.replace(
        config.eval, suites=[str(prompts)], arms=[], repeats=1, greedy=not temperature, sampled=bool(temperature),
        temperature=[temperature] if temperature else [], max_new_tokens=max_new_tokens, distribution_samples=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="specdec-parity-") as folder:
        result = evaluate(dataclasses.replace(config, eval=settings), head_dir, Path(folder))
    served, trained = (result["summary"][name] for name in ("acceptance_length", "trained_acceptance_length"))
    if served is None or trained is None:
        raise ValueError(f"nothing to compare: {'; '.join(result['notes']) or 'the server drafted nothing'}")
    drafts = result["cells"][0]["arms"]["spec"]["acceptance"]
    chance = len(drafts["per_position_rates"]) / drafts["num_drafts"] ** 0.5 if temperature else 0.0
    if abs(served - trained) <= MAX_DIFFERENCE * served + chance:
        return []
    what = f"served, the acceptance length is {served:.3f}; training measured {trained:.3f} on the same prompts"
    return [
        Finding(code="parity", what=what, fix="the server computes another head than training did: export it again")
    ]


def _decoding(prompts: Path) -> tuple[float, int]:
    """Temperature and number of tokens with which the rows of these prompts were made.

    Raises:
        ValueError: that is not known, or another model made them.
    """
    path = prompts.parent / CARD_NAME
    try:
        card = json.loads(path.read_text())
        temperature, max_new_tokens = card["settings"]["temperature"], card["settings"]["max_new_tokens"]
        is_own = card["on_policy"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--parity reads from {path} how the rows were decoded, and can't ({error}): give the val_prompts.jsonl in "
            "the folder that `specdec prepare` wrote"
        ) from error
    if not is_own:
        raise ValueError(
            "--parity compares what the target itself writes, and these rows are another model's text: make some with "
            "`specdec prepare --set traces.regenerate=true` and train on them"
        )
    return float(temperature), int(max_new_tokens)
