"""``specdec train``: rows -> features -> trained head -> a directory that vLLM loads, with its manifest."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_training.heads import HeadSpec, load_head
from draft_training.prepare import CARD_NAME, SETTINGS_NAME, prepare
from draft_training.row_store import load_rows
from draft_training.run_identity import differences, run_identity
from draft_training.train_log import require_tensorboard
from specdec.config import RunConfig, TrainConfig, from_dict
from specdec.device import Device, detect_device, num_processes, process_rank
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts
from specdec.record import provenance
from specdec.targets import Target, resolve_target
from specdec.traces import TokenRow

if TYPE_CHECKING:
    from draft_training.distributed import Processes
    from draft_training.features import FeatureStore
    from draft_training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, source: str | Path | None, out_dir: Path) -> HeadManifest:
    """Train ``config.head`` for ``config.target`` and export it to ``out_dir``.

    ``source`` is whatever ``traces.files`` may name, or a directory of rows that ``prepare`` made; None: rows of
    ``config.traces``.
    Running it again continues an interrupted run, and returns at once when the run is complete. Under ``torchrun`` or
    ``accelerate launch`` all processes call it; the first alone writes, and ``out_dir`` must be on a disk they share.

    Raises:
        ValueError: bad input or settings, an ``out_dir`` of another run, or another process of the run is gone.
        Interrupted: stopped by a signal; the same command resumes.
    """
    _check_settings(config.train)
    spec = load_head(config.head.name)
    options = from_dict(spec.options_cls, config.head.options, "head.options.")
    target = resolve_target(config.target)
    aux_layer_ids = spec.aux_layer_ids(options, int(target.config["num_hidden_layers"]))
    rows_dir = _rows_directory(config, source, out_dir)
    from draft_training.distributed import Processes  # torch: behind everything that fails fast

    processes = Processes(config.train.parallel, detect_device())  # the others wait in it for the first one's rows
    card = json.loads((rows_dir / CARD_NAME).read_text())
    if card["settings"]["target"] != dataclasses.asdict(target.fingerprint()):
        raise ValueError(f"{rows_dir} holds rows of another target; make rows for {target.name} with `specdec prepare`")
    identity = run_identity(config, card, target)
    finished = _finished(out_dir, identity)
    if finished is not None:
        logger.info("%s is complete", out_dir)
        processes.end()
        return finished
    splits = {name: load_rows(rows_dir / name) for name in ("train", "val")}
    with processes.losing_peers():
        manifest = _train_rows(
            config, spec, options, target, aux_layer_ids, splits, card["on_policy"], identity, out_dir, processes
        )
        processes.end()
    return manifest


def _check_settings(train: TrainConfig) -> None:
    """Before hours of work: what the trainer would refuse behind them."""
    if train.accumulation_steps < 1:
        raise ValueError(f"train.accumulation_steps must be 1 or more, got {train.accumulation_steps}")
    if train.precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"train.precision must be auto, bf16 or fp32, got {train.precision!r}")
    if train.tensorboard:
        require_tensorboard()


def _rows_directory(config: RunConfig, source: str | Path | None, out_dir: Path) -> Path:
    made = Path(source) if source is not None else None
    if made is not None and (made / CARD_NAME).is_file():
        return made
    if made is not None and ((made / SETTINGS_NAME).is_file() or (made.is_dir() and not any(made.iterdir()))):
        raise ValueError(f"{made} holds no {CARD_NAME}: no finished `specdec prepare` directory; run that first")
    if source is not None:
        config.traces.files = [str(source)]
    rows_dir = out_dir / "rows"
    answers = config.traces.regenerate or not config.traces.files
    if num_processes() > 1 and answers and not (rows_dir / CARD_NAME).is_file():
        raise ValueError(
            "the target answers prompts in one process: run `specdec prepare` first, and give its folder as --traces"
        )
    if process_rank() == 0:
        prepare(config, rows_dir)
    return rows_dir


def _finished(out_dir: Path, identity: dict[str, Any]) -> HeadManifest | None:
    try:
        manifest = HeadManifest.load(out_dir)
    except ValueError:
        return None
    if (there := manifest.provenance.get("identity")) != identity:
        raise ValueError(
            f"{out_dir} holds a head of other settings or rows ({differences(there, identity)}); pass another --out"
        )
    return manifest


def choose_draft_tokens(rows: list[TokenRow], vocab_size: int, draft_vocab_size: int) -> list[int]:
    """Ascending target ids that the head may draft: the most frequent completion tokens of ``rows``.

    Room left over goes to the lowest ids: a BPE vocabulary is ordered by how often its merges occurred.
    """
    counts = Counter(token for row in rows for token in row.input_ids[row.prompt_span[1] :])
    chosen = dict.fromkeys(token for token, _ in counts.most_common(draft_vocab_size))
    for token in range(vocab_size):
        if len(chosen) >= min(draft_vocab_size, vocab_size):
            break
        chosen.setdefault(token)
    return sorted(chosen)


def _train_rows(
    config: RunConfig,
    spec: HeadSpec,
    options: Any,
    target: Target,
    aux_layer_ids: list[int],
    splits: dict[str, list[TokenRow]],
    on_policy: bool,
    identity: dict[str, Any],
    out_dir: Path,
    processes: Processes,
) -> HeadManifest:
    import torch

    from draft_training.features import TargetModel
    from draft_training.trainer import Trainer

    device = detect_device()
    dtype = device.dtype if config.target.dtype == "auto" else config.target.dtype
    torch.manual_seed(config.train.seed)
    target_model = TargetModel.load(target, dtype, device)
    started = time.monotonic()
    stores = _feature_stores(config.train, target_model, aux_layer_ids, splits, processes)
    feature_sec = time.monotonic() - started
    vocab_size = int(target.config["vocab_size"])
    draft_ids = choose_draft_tokens(splits["train"], vocab_size, spec.draft_vocab_size(options, vocab_size))
    head = spec.build(target_model, torch.tensor(draft_ids), options, config.head.num_speculative_tokens)
    head.to(target_model.device)
    trainer = Trainer(
        head=head,
        train_store=stores["train"],
        val_store=stores["val"],
        config=config.train,
        precision=_precision(config, device),
        on_policy=on_policy,
        work_dir=out_dir / "work",
        identity=identity,
        processes=processes,
    )
    trainer.run()
    acceptance, by_prompt = _export(trainer, out_dir)
    state = trainer.state
    tokens = sum(len(row.input_ids) for row in splits["train"] + splits["val"])
    manifest = HeadManifest(
        head=spec.name,
        vllm_method=spec.vllm_method,
        vllm_speculative=spec.vllm_speculative,
        num_speculative_tokens=config.head.num_speculative_tokens,
        target_name=target.name,
        target=target.fingerprint(),
        draft_vocab_size=len(draft_ids),
        acceptance=acceptance,
        acceptance_by_prompt=by_prompt,
        provenance=provenance(
            identity=identity,
            config=dataclasses.asdict(config),
            num_processes=processes.count,
            best_step=state.best_step,
            history=state.history,
            train_tok_per_sec=state.num_tokens / state.train_sec if state.train_sec else None,
            train_sec=state.train_sec,
            feature_tok_per_sec=tokens / feature_sec,
            feature_sec=feature_sec,
        ),
    )
    if processes.is_first:
        manifest.save(out_dir)  # last: its presence says that the head is complete
    return manifest


def _feature_stores(
    train: TrainConfig,
    target_model: Any,
    aux_layer_ids: list[int],
    splits: dict[str, list[TokenRow]],
    processes: Processes,
) -> dict[str, FeatureStore]:
    """Of all training rows, this process's home rows computed; of the held-out ones, its share alone."""
    from draft_training.distributed import home_of
    from draft_training.features import FeatureStore

    max_bytes = int(train.feature_cache_gib * 2**30)
    rows = {"train": splits["train"], "val": splits["val"][processes.rank :: processes.count]}
    stores = {name: FeatureStore(target_model, rows[name], aux_layer_ids, max_bytes) for name in rows}
    stores["val"].max_bytes = max_bytes // 4
    at_home = [i for i in range(len(rows["train"])) if home_of(i, processes.count) == processes.rank]
    batch_tokens = max(train.batch_tokens, 2048)
    stores["train"].fill(batch_tokens, "target features (train)", at_home)
    stores["val"].fill(batch_tokens, "target features (val)")
    return stores


def _export(trainer: Trainer, out_dir: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Write the head; returns the held-out acceptance of what was written, rounding included, and by conversation."""
    import torch

    from draft_training.selection import HeldOutAcceptance, held_out_acceptance

    head, processes = trainer.head, trainer.processes
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    with processes.whole_weights(trainer.model):
        own = held_out_acceptance(head, trainer.val_store, trainer.on_policy, trainer.config.batch_tokens)
        if processes.is_first:
            head.export(out_dir, torch.bfloat16)
    acceptance = HeldOutAcceptance.merged(processes.gather(own))
    figures = {
        **_figures(acceptance.total),
        "by_span": {name: _figures(counts) for name, counts in acceptance.by_span.items()},
        "on_policy": trainer.on_policy,
    }
    return figures, acceptance.accepted_by_conversation


def _precision(config: RunConfig, device: Device) -> str:
    if config.train.precision == "auto":
        return "bf16" if device.native_bf16 else "fp32"
    return config.train.precision


def _figures(counts: AcceptanceCounts) -> dict[str, Any]:
    return {
        **dataclasses.asdict(counts),
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "per_position_rates": counts.per_position_rates,
    }
