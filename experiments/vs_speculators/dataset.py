"""``python experiments/vs_speculators/dataset.py ROWS OUT``: the same rows and target features for both libraries.

For speculators as it reads them: train rows first and held-out rows last, so that its split is ours. For specdec as a
feature cache. ``OUT/pilot`` holds a part of the rows for timing specdec's training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from safetensors.torch import save_file

from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens
from draft_training.feature_cache import FeatureCache
from draft_training.features import FeatureStore, length_groups
from draft_training.heads.eagle3.config import Eagle3Options
from draft_training.prepare import CARD_NAME
from draft_training.row_store import load_rows, save_split
from draft_training.target_model import TargetModel
from experiments.vs_speculators.sides import DRAFT_VOCAB_SIZE, FEATURE_CACHE_GIB
from specdec.config import RunConfig
from specdec.device import detect_device
from specdec.progress import progress_bar
from specdec.record import write_json_atomic
from specdec.targets import resolve_target
from specdec.traces import TokenRow

BATCH_TOKENS = 2048
PILOT_ROWS = 48


def write_dataset(rows: list[TokenRow], out: Path) -> None:
    """Ids and masks; the layout is that of its ``prepare-data``."""
    disable_progress_bars()
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        "seq_len": [len(row.input_ids) for row in rows],
    }
    Dataset.from_dict(columns).with_format("torch").save_to_disk(out)


def write_features(model: TargetModel, layer_ids: list[int], rows: list[TokenRow], out: Path) -> None:
    """[T, A + 1, H] bf16 a row: the tapped layers, and the last layer before the target's final norm."""
    layer_ids = [*layer_ids, int(model.config.num_hidden_layers)]
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    with progress_bar("target features for the rival", len(rows)) as advance:
        for group in length_groups(order, lambda i: len(rows[i].input_ids), BATCH_TOKENS):
            features = model.forward_rows([rows[i].input_ids for i in group], layer_ids)
            for index, row_features in zip(group, features, strict=True):
                tensors = {
                    "hidden_states": row_features.aux_hidden.to(torch.bfloat16).contiguous(),
                    "token_ids": torch.tensor(rows[index].input_ids),
                }
                save_file(tensors, out / f"hs_{index}.safetensors")
            advance(len(group))


def fill_cache(model: TargetModel, layer_ids: list[int], rows: list[TokenRow], root: Path) -> None:
    """What ``specdec train`` then finds in ``train.feature_cache_dir``."""
    fingerprint = resolve_target(RunConfig().target).fingerprint()
    cache = FeatureCache(root, FEATURE_CACHE_GIB * 2**30, fingerprint, model.embedding.dtype, rows)
    FeatureStore(model, rows, layer_ids, 0, cache).fill(BATCH_TOKENS, "target features for specdec")


def main() -> None:
    rows_dir, out = map(Path, sys.argv[1:])
    target, device = resolve_target(RunConfig().target), detect_device()
    layer_ids = Eagle3Options().resolve_aux_layer_ids(int(target.config["num_hidden_layers"]))
    model = TargetModel.load(target, device.dtype, device)
    train, held_out = load_rows(rows_dir / "train"), load_rows(rows_dir / "val")
    rows = [*train, *held_out]
    write_dataset(rows, out)
    write_features(model, layer_ids, rows, out / "hidden_states")
    vocab_size = int(model.config.vocab_size)
    # It keeps the most frequent tokens: with ours alone in the table, it keeps ours.
    ours = choose_draft_tokens(count_completion_tokens(train), vocab_size, DRAFT_VOCAB_SIZE)
    torch.save(dict.fromkeys(ours, 1), out / "token_freq.pt")
    card = json.loads((rows_dir / CARD_NAME).read_text())
    for part in (train, held_out):
        fill_cache(model, layer_ids, list(part), out / "features")
    for name, split in {"train": train[:PILOT_ROWS], "val": held_out[:4]}.items():
        fill_cache(model, layer_ids, split, out / "features")
        table = load_from_disk(str(rows_dir / name))
        card["splits"][name] = save_split(table, list(range(len(split))), out / "pilot" / name)
    write_json_atomic(out / "pilot" / CARD_NAME, card)  # last: its presence says that all is there


if __name__ == "__main__":
    main()
