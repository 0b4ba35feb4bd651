"""``python experiments/r1_traces/verdict.py TRACES ROWS HEAD``: masks decoded to their traces; acceptance by span."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draft_training.prepare import CARD_NAME
from draft_training.row_store import load_rows
from draft_training.tokenizer import load_tokenizer
from specdec.config import TargetConfig
from specdec.conventions import UnusableRowError, traces_of
from specdec.manifest import HeadManifest
from specdec.record import write_json_atomic
from specdec.rows import read_rows
from specdec.targets import resolve_target
from specdec.traces import THINK_CLOSE, THINK_OPEN, TokenRow

OUT = Path(__file__).with_name("result.json")
NUM_CHECKED = 50


def completions_of(source: str) -> dict[str, set[str]]:
    """By prompt: what a model wrote, from behind the opening think tag on."""
    texts: dict[str, set[str]] = {}
    for _, item in read_rows(source):
        try:
            found = traces_of(item)
        except UnusableRowError:
            continue
        for trace in found:
            texts.setdefault(trace.prompt, set()).add(f"{trace.reasoning}\n{THINK_CLOSE}\n\n{trace.response}")
    return texts


def check_mask(rows: Sequence[TokenRow], tokenizer: Any, texts: dict[str, set[str]], count: int = NUM_CHECKED) -> int:
    """Decode the masked tokens of ``count`` random rows, and the others.

    Returns: how many rows were checked.

    Raises:
        ValueError: the mask of a row is not its reasoning and response, or a span ends elsewhere.
    """
    checked = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    for row in (rows[index] for index in checked):
        masked = tokenizer.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m])
        prompt = tokenizer.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if not m])
        thought = tokenizer.decode(row.input_ids[slice(*row.think_span)])
        written = masked.removeprefix(f"{THINK_OPEN}\n").removesuffix(tokenizer.eos_token)
        if written not in texts.get(row.prompt, ()) or row.prompt not in prompt:
            raise ValueError(
                f"row {row.conversation_id}: the mask holds {masked[:200]!r}..., the rest {prompt[-200:]!r}"
            )
        if not thought.endswith(THINK_CLOSE) or row.think_span[1] != row.answer_span[0]:
            raise ValueError(f"row {row.conversation_id}: its thought ends with {thought[-80:]!r}")
    return len(checked)


def main() -> None:
    source, rows_dir, head_dir = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    manifest = HeadManifest.load(head_dir)
    rows = [row for name in ("train", "val") for row in load_rows(rows_dir / name)]
    tokenizer = load_tokenizer(resolve_target(TargetConfig(name=manifest.target_name)))
    card = json.loads((rows_dir / CARD_NAME).read_text())
    training = ("train_tok_per_sec", "feature_tok_per_sec", "train_sec", "best_step", "history", "coverage")
    run = ("command", "created", "git_sha", "git_dirty", "versions", "hardware")
    found = {
        "num_masks_checked": check_mask(rows, tokenizer, completions_of(source)),
        "splits": card["splits"],
        "dropped": card["dropped"],
        "acceptance": manifest.acceptance,
        **{name: manifest.provenance[name] for name in training},
        "provenance": {name: manifest.provenance[name] for name in run},
    }
    write_json_atomic(OUT, found)
    spans = {name: span["acceptance_length"] for name, span in manifest.acceptance["by_span"].items()}
    print(json.dumps({"masks_checked": found["num_masks_checked"], "acceptance_length_by_span": spans}))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
