"""``specdec train``: rows -> features -> trained head -> a directory that vLLM loads, with its manifest."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens, covered_share
from draft_training.exported import open_head
from draft_training.heads import HeadSpec, load_head
from draft_training.prepare import CARD_NAME, SETTINGS_NAME, prepare
from draft_training.recipe import check_recipe, settled
from draft_training.row_store import StoredRows, load_rows
from draft_training.run_identity import differences, run_identity
from draft_training.train_log import require_tensorboard
from draft_training.warm_start import head_config_of
from draft_training.windows import Coverage
from specdec.config import RunConfig, from_dict
from specdec.device import Device, detect_device, num_processes, process_rank
from specdec.manifest import HeadManifest
from specdec.record import provenance
from specdec.targets import Target, resolve_target

if TYPE_CHECKING:
    from draft_training.distributed import Processes
    from draft_training.features import FeatureStore
    from draft_training.selection import HeldOutAcceptance
    from draft_training.target_model import TargetModel
    from draft_training.trainer import Trainer

logger = logging.getLogger(__name__)

# oneDNN and PyTorch's layer over it each keep what they made for a matrix shape, 0.3 to 1 MB of it: of batches of many
# shapes that were hundreds of MiB. Both must forget for either to help, and they read this when first used.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KERNELS_KEPT = 64


def train(config: RunConfig, source: str | Path | None, out_dir: Path) -> HeadManifest:
    """Train ``config.head`` for ``config.target`` and export it to ``out_dir``.

    ``source`` is whatever ``traces.files`` may name, or a directory of rows that ``prepare`` made; None: rows of
    ``config.traces``. With ``train.init_head`` that head goes on learning; what is exported is never worse than it was.
    Running it again continues an interrupted run, and returns at once when the run is complete. Under ``torchrun`` or
    ``accelerate launch`` all processes call it; the first alone writes, and ``out_dir`` must be on a disk they share.

    Raises:
        ValueError: bad input or settings, an ``out_dir`` of another run, or another process of the run is gone.
        Interrupted: stopped by a signal; the same command resumes.
    """
    check_recipe(config.train)
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))
    config.train = settled(config.train, detect_device())  # a resumed run must not settle it in another way
    if config.train.tensorboard:
        require_tensorboard()
    init_dir = Path(config.train.init_head) if config.train.init_head is not None else None
    if init_dir is not None:
        config.head = head_config_of(init_dir, config.head)
    spec = load_head(config.head.name)
    options = from_dict(spec.options_cls, config.head.options, "head.options.")
    target = resolve_target(config.target)
    if init_dir is not None:
        HeadManifest.load(init_dir).check_target(target.fingerprint())
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


def _rows_directory(config: RunConfig, source: str | Path | None, out_dir: Path) -> Path:
    made = Path(source) if source is not None else None
    if made is not None and (made / CARD_NAME).is_file():
        return made
    if made is not None and ((made / SETTINGS_NAME).is_file() or (made.is_dir() and not any(made.iterdir()))):
        raise ValueError(f"{made} holds no {CARD_NAME}: no finished `specdec prepare` directory; run that first")
    if source is not None:
        config.traces.files = [str(source)]
    rows_dir = out_dir / "rows"
    answers = config.traces.regenerate or not (config.traces.files or config.traces.served)
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


def _train_rows(
    config: RunConfig,
    spec: HeadSpec,
    options: Any,
    target: Target,
    aux_layer_ids: list[int],
    splits: dict[str, StoredRows],
    on_policy: bool,
    identity: dict[str, Any],
    out_dir: Path,
    processes: Processes,
) -> HeadManifest:
    import torch

    from draft_training.target_model import TargetModel
    from draft_training.trainer import Trainer

    device = detect_device()
    torch.manual_seed(config.train.seed)
    target_model = TargetModel.load(target, device.settled(config.target.dtype), device)
    started = time.monotonic()
    stores = _filled_stores(config, target, target_model, aux_layer_ids, splits, processes)
    feature_sec = time.monotonic() - started
    token_counts = count_completion_tokens(splits["train"])
    head = _new_head(config, spec, options, target_model, token_counts)
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
        measure_start=config.train.init_head is not None,
    )
    _log_coverage(trainer.coverage, config.train.window_tokens)
    trainer.run()
    acceptance = _export(trainer, out_dir)
    num_tokens = sum(sum(store.lengths) for store in stores.values())
    facts = {
        "feature_sec": feature_sec,
        "feature_tok_per_sec": num_tokens / feature_sec,
        "draft_vocab_coverage": covered_share(token_counts, head.draft_token_ids.tolist()),
        **_training_figures(trainer),
    }
    manifest = _manifest(config, spec, target, trainer, acceptance, facts)
    if processes.is_first:
        manifest.save(out_dir)  # last: its presence says that the head is complete
    return manifest


def _manifest(
    config: RunConfig,
    spec: HeadSpec,
    target: Target,
    trainer: Trainer,
    acceptance: HeldOutAcceptance,
    facts: dict[str, Any],
) -> HeadManifest:
    return HeadManifest(
        head=spec.name,
        vllm_method=spec.vllm_method,
        vllm_speculative=spec.vllm_speculative,
        num_speculative_tokens=config.head.num_speculative_tokens,
        target_name=target.name,
        target=target.fingerprint(),
        draft_vocab_size=trainer.head.draft_vocab_size,
        acceptance={**acceptance.figures(), "on_policy": trainer.on_policy},
        acceptance_by_prompt=acceptance.accepted_by_conversation,
        provenance=provenance(identity=trainer.identity, config=dataclasses.asdict(config), **facts),
    )


def _new_head(
    config: RunConfig, spec: HeadSpec, options: Any, target_model: TargetModel, token_counts: Counter[int]
) -> Any:
    """On the target's device: ``train.init_head`` where that is set."""
    import torch

    if config.train.init_head is not None:
        return open_head(Path(config.train.init_head), target_model)
    vocab_size = int(target_model.config.vocab_size)
    size = spec.draft_vocab_size(options, vocab_size, token_counts)
    draft_ids = choose_draft_tokens(token_counts, vocab_size, size)
    head = spec.build(target_model, torch.tensor(draft_ids), options, config.head.num_speculative_tokens)
    return head.to(target_model.device)


def _filled_stores(
    config: RunConfig,
    target: Target,
    target_model: TargetModel,
    aux_layer_ids: list[int],
    splits: dict[str, StoredRows],
    processes: Processes,
) -> dict[str, FeatureStore]:
    """The features of each split, within one bound for all: in memory of this process's own rows; in a cache of all
    rows, which the processes fill together. Collective."""
    from draft_training.feature_cache import FeatureCache
    from draft_training.features import FeatureStore

    bound = int(config.train.feature_cache_gib * 2**30)
    stores: dict[str, FeatureStore] = {}
    for name, rows in splits.items():
        cache = None
        if config.train.feature_cache_dir is not None:
            root = Path(config.train.feature_cache_dir).expanduser()
            cache = FeatureCache(root, bound, target.fingerprint(), target_model.embedding.dtype, rows)
        in_memory = sum(store.num_bytes for store in stores.values())
        stores[name] = FeatureStore(target_model, rows, aux_layer_ids, bound - in_memory, cache)
        own_rows = processes.own_rows(len(rows))
        stores[name].fill(max(config.train.batch_tokens, 2048), f"target features ({name})", own_rows)
    processes.wait()  # the time that this took is everybody's
    if all(store.is_complete for store in stores.values()):
        target_model.drop_layers()
    return stores


def _log_coverage(reached: Coverage, window_tokens: int) -> None:
    if reached.num_windowed_rows:
        logger.info(
            "%d of %d rows are longer than train.window_tokens=%d: of each one window an epoch is drawn, and in all "
            "epochs together %.1f %% of the rows' loss positions",
            reached.num_windowed_rows, reached.num_rows, window_tokens, 100 * reached.share,
        )  # fmt: skip


def _export(trainer: Trainer, out_dir: Path) -> HeldOutAcceptance:
    """Write the head; returns the acceptance of what was written, rounding included. Collective."""
    import torch

    with torch.no_grad():
        for parameter in trainer.head.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    acceptance = trainer.measure()
    with trainer.processes.whole_weights(trainer.model):
        if trainer.processes.is_first:
            trainer.head.export(out_dir, torch.bfloat16)
    return acceptance


def _precision(config: RunConfig, device: Device) -> str:
    if config.train.precision == "auto":
        return "bf16" if device.native_bf16 else "fp32"
    return config.train.precision


def _training_figures(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "num_processes": trainer.processes.count,
        "best_step": state.best_step,
        "history": state.history,
        "coverage": {**dataclasses.asdict(trainer.coverage), "share": trainer.coverage.share},
        "train_tok_per_sec": state.num_tokens / state.train_sec if state.train_sec else None,
        "train_sec": state.train_sec,
    }
