"""Training steps on the same rows in turn: padded side by side, packed into strips, and padded with positions scored
against all others ("dense"), also those that it can't see.

python -m experiments.packing.speed ROWS_DIR:TOKENS [...] [--rounds N] [--rows-each N] [--acceptance FILE]
    [--work DIR] [--out FILE]

TOKENS are those of a step, and of a strip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from draft_training import layers
from draft_training.collate import strip_tokens, strips
from draft_training.padding import padded_length
from draft_training.trainer import Trainer
from draft_training.windows import Window
from experiments.ablations.arms import DEFAULT, Bench, arm_config, make_trainer
from specdec.progress import progress_bar
from specdec.record import provenance, write_json_atomic

PADDED, PACKED, DENSE = "padded", "packed", "dense"
STEPS_PER_TURN = 6
EVERYTHING = 2**31


def padded_tokens(batch: list[Window], pack_tokens: int | None) -> int:
    """What a batch's matrices hold, real or not."""
    laid = strips(batch, pack_tokens)
    return len(laid) * padded_length(max(map(strip_tokens, laid)))


def turn(trainer: Trainer, first: int, stretch_anchors: int) -> dict[str, float]:
    """Some steps of a run from step ``first`` on."""
    layers.STRETCH_ANCHORS = stretch_anchors
    batches = [trainer.batches[i % len(trainer.batches)] for i in range(first, first + STEPS_PER_TURN)]
    started = time.perf_counter()
    for batch in batches:
        trainer._train_step(batch)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(strip_tokens, batches))
    num_padded = sum(padded_tokens(batch, trainer.config.pack_tokens) for batch in batches)
    return {"tok_per_sec": num_tokens / seconds, "step_tokens": num_tokens / STEPS_PER_TURN,
            "padding": 1 - num_tokens / num_padded}  # fmt: skip


def measure(rows_dir: Path, tokens: int, rounds: int, max_rows: int) -> dict[str, Any]:
    """All in turn; the first turn of each does not count."""
    bench = Bench(rows_dir, [])
    bench.rows = {name: rows[:max_rows] for name, rows in bench.rows.items()}
    trainers = {}
    for arm in (PADDED, PACKED):
        config = arm_config(DEFAULT, 0, [f"train.batch_tokens={tokens}"])
        config.train.pack_tokens = tokens if arm == PACKED else None
        trainers[arm] = make_trainer(bench, config, Path())
    trainers[DENSE], stretch_anchors = trainers[PADDED], layers.STRETCH_ANCHORS
    turns: dict[str, list[dict[str, float]]] = {arm: [] for arm in trainers}
    with progress_bar(f"steps of {tokens} tokens", (rounds + 1) * len(trainers)) as advance:
        for number in range(rounds + 1):
            for arm in list(trainers)[:: 1 if number % 2 else -1]:
                found = turn(trainers[arm], number * STEPS_PER_TURN, EVERYTHING if arm == DENSE else stretch_anchors)
                turns[arm] += [found] if number else []
                advance(1, f"{arm} {found['tok_per_sec']:.0f} tokens/s")
    lengths = [len(row.input_ids) for row in bench.rows["train"]]

    def over_padded(arm: str) -> dict[str, float]:
        pairs = zip(turns[arm], turns[PADDED], strict=True)
        ratios = [own["tok_per_sec"] / padded["tok_per_sec"] for own, padded in pairs]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    def middle(arm: str) -> dict[str, float]:
        return {key: statistics.median(each[key] for each in turns[arm]) for key in turns[arm][0]}

    return {
        "rows": {"count": len(lengths), "tokens_median": statistics.median(lengths), "tokens_max": max(lengths)},
        "step_tokens": tokens,
        "over_padded": {arm: over_padded(arm) for arm in (PACKED, DENSE)},
        "median": {arm: middle(arm) for arm in turns},
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROWS_DIR:TOKENS")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows-each", type=int, default=64)
    parser.add_argument("--acceptance", type=Path, help="result.json of both arms of the ablations")
    parser.add_argument("--work", type=Path, default=Path("runs/packing"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    options = parser.parse_args()
    speed = {}
    for place in options.rows:
        rows_dir, _, tokens = place.rpartition(":")
        kept = options.work / f"speed-{tokens}.json"
        if not kept.is_file():  # what an interrupted run has measured stays
            write_json_atomic(kept, measure(Path(rows_dir), int(tokens), options.rounds, options.rows_each))
        speed[place] = json.loads(kept.read_text())
    learnt = json.loads(options.acceptance.read_text())["arms"] if options.acceptance else []
    facts = provenance(steps_per_turn=STEPS_PER_TURN)
    write_json_atomic(options.out, {"speed": speed, "acceptance": learnt, "provenance": facts})
    print(json.dumps({name: [found["over_padded"], found["median"]] for name, found in speed.items()}, indent=2))


if __name__ == "__main__":
    main()
