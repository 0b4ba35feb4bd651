"""How fast are target features and head training, and what share of this machine's matrix peak is that?

    python experiments/train_throughput/run.py ROWS_DIR [section.key=value ...]

ROWS_DIR is made by ``specdec prepare``. Peak is the best of several large float32 products, measured in turn with the
work, so that a busy neighbour slows both. Flops are counted by torch, not estimated. Writes result.json beside this.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from draft_training.distributed import Processes
from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens
from draft_training.features import FeatureStore
from draft_training.heads import load_head
from draft_training.row_store import load_rows
from draft_training.target_model import TargetModel
from draft_training.trainer import Trainer
from specdec.config import from_dict, load_config
from specdec.demo import DEMO_SETTINGS
from specdec.device import detect_device
from specdec.record import provenance, write_json_atomic
from specdec.targets import resolve_target

ROUNDS, STEPS_PER_ROUND, ROWS_PER_ROUND = 5, 6, 8


def peak_flops_per_sec() -> float:
    """Best of 20 products of [2048, 2048] float32 matrices."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def timed(work) -> tuple[float, float]:
    """(seconds, flops) of one call; flops are counted in a second one."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    with FlopCounterMode(display=False) as counter:
        work()
    return seconds, float(counter.get_total_flops())


def main() -> None:
    rows_dir, overrides = Path(sys.argv[1]), sys.argv[2:]
    config = load_config(None, [*DEMO_SETTINGS, *overrides])
    target, device = resolve_target(config.target), detect_device()
    model = TargetModel.load(target, device.dtype, device)
    rows = load_rows(rows_dir / "train")
    spec = load_head(config.head.name)
    options = from_dict(spec.options_cls, config.head.options)
    aux_ids = spec.aux_layer_ids(options, int(target.config["num_hidden_layers"]))
    store = FeatureStore(model, rows[: ROUNDS * ROWS_PER_ROUND], aux_ids, max_bytes=2**33)
    counts = count_completion_tokens(rows)
    ids = choose_draft_tokens(counts, int(target.config["vocab_size"]), options.draft_vocab_size)
    head = spec.build(model, torch.tensor(ids), options, config.head.num_speculative_tokens)
    trainer = Trainer(
        head=head, train_store=store, val_store=store, config=config.train, precision="fp32", on_policy=True,
        work_dir=Path(), identity={}, processes=Processes("ddp", device),
    )  # fmt: skip
    measured: dict[str, list[dict[str, float]]] = {"features": [], "training": []}
    for i in range(ROUNDS):
        group = list(range(i * ROWS_PER_ROUND, (i + 1) * ROWS_PER_ROUND))
        peak = peak_flops_per_sec()
        seconds, flops = timed(lambda group=group: model.forward_rows([rows[j].input_ids for j in group], aux_ids))
        num_tokens = sum(len(rows[j].input_ids) for j in group)
        measured["features"].append({"tok_per_sec": num_tokens / seconds, "share_of_peak": flops / seconds / peak})
    trainer._train_step(trainer.batches[0])  # warm-up
    for i in range(ROUNDS):
        batches = trainer.batches[i * STEPS_PER_ROUND : (i + 1) * STEPS_PER_ROUND]
        peak = peak_flops_per_sec()
        seconds, flops = timed(lambda batches=batches: [trainer._train_step(batch) for batch in batches])
        num_tokens = sum(window.num_tokens for batch in batches for window in batch)
        measured["training"].append({"tok_per_sec": num_tokens / seconds, "share_of_peak": flops / seconds / peak})
    summary = {
        stage: {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name in rounds[0]
            for values in [[each[name] for each in rounds]]
        }
        for stage, rounds in measured.items()
    }
    facts = provenance(target=target.name, settings=[*DEMO_SETTINGS, *overrides], threads=torch.get_num_threads())
    write_json_atomic(
        Path(__file__).with_name("result.json"), {"summary": summary, "rounds": measured, "provenance": facts}
    )
    print(summary)


if __name__ == "__main__":
    main()
