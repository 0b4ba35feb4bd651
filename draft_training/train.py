"""``specdec train``: rows -> features -> trained head -> a directory that vLLM loads, with its manifest."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens, covered_share
from draft_training.heads import HeadSpec, load_head
from draft_training.prepare import CARD_NAME, SETTINGS_NAME, prepare
from draft_training.recipe import check_recipe
from draft_training.row_store import load_rows
from draft_training.warm_start import digest_of, drafted_tokens, head_config_of, load_weights
from draft_training.windows import Coverage
from specdec.config import RunConfig, dump_yaml, from_dict
from specdec.device import Device, detect_device
from specdec.manifest import HeadManifest
from specdec.metrics import OUTPUT_BUCKET_TOKENS, AcceptanceCounts
from specdec.record import provenance, text_sha256
from specdec.targets import Target, resolve_target
from specdec.traces import TokenRow

if TYPE_CHECKING:
    from draft_training.features import FeatureStore, TargetModel
    from draft_training.selection import HeldOutAcceptance
    from draft_training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig, source: str | Path | None, out_dir: Path) -> HeadManifest:
    """Train ``config.head`` for ``config.target`` and export it to ``out_dir``.

    ``source`` is whatever ``traces.files`` may name, or a directory of rows that ``prepare`` made; None: rows of
    ``config.traces``. With ``train.init_head`` that head goes on learning; what is exported is never worse than it was.
    Running it again continues an interrupted run, and returns at once when the run is complete.

    Raises:
        ValueError: bad input or settings, or an ``out_dir`` of another run.
        Interrupted: stopped by a signal; the same command resumes.
    """
    check_recipe(config.train)
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
    card = json.loads((rows_dir / CARD_NAME).read_text())
    if card["settings"]["target"] != dataclasses.asdict(target.fingerprint()):
        raise ValueError(f"{rows_dir} holds rows of another target; make rows for {target.name} with `specdec prepare`")
    identity = _identity(config, card, target)
    finished = _finished(out_dir, identity)
    if finished is not None:
        logger.info("%s is complete", out_dir)
        return finished
    splits = {name: load_rows(rows_dir / name) for name in ("train", "val")}
    return _train_rows(config, spec, options, target, aux_layer_ids, splits, card["on_policy"], identity, out_dir)


def _rows_directory(config: RunConfig, source: str | Path | None, out_dir: Path) -> Path:
    made = Path(source) if source is not None else None
    if made is not None and (made / CARD_NAME).is_file():
        return made
    if made is not None and ((made / SETTINGS_NAME).is_file() or (made.is_dir() and not any(made.iterdir()))):
        raise ValueError(f"{made} holds no {CARD_NAME}: no finished `specdec prepare` directory; run that first")
    if source is not None:
        config.traces.files = [str(source)]
    rows_dir = out_dir / "rows"
    prepare(config, rows_dir)
    return rows_dir


def _identity(config: RunConfig, card: dict[str, Any], target: Target) -> str:
    hashes = [card["splits"][name]["input_ids_sha256"] for name in ("train", "val")]
    # Where features lie changes no head: a run may go on with another folder or bound.
    facts = [config.head, dataclasses.replace(config.train, feature_cache_dir=None, feature_cache_gib=0.0)]
    if config.train.init_head is not None:
        hashes.append(digest_of(Path(config.train.init_head)))
    return text_sha256(*hashes, *map(dump_yaml, facts), json.dumps(dataclasses.asdict(target.fingerprint())))


def _finished(out_dir: Path, identity: str) -> HeadManifest | None:
    try:
        manifest = HeadManifest.load(out_dir)
    except ValueError:
        return None
    if manifest.provenance.get("identity") != identity:
        raise ValueError(f"{out_dir} holds a head of other settings or rows; pass another --out")
    return manifest


def _train_rows(
    config: RunConfig,
    spec: HeadSpec,
    options: Any,
    target: Target,
    aux_layer_ids: list[int],
    splits: dict[str, list[TokenRow]],
    on_policy: bool,
    identity: str,
    out_dir: Path,
) -> HeadManifest:
    import torch

    from draft_training.features import TargetModel
    from draft_training.selection import held_out_acceptance
    from draft_training.trainer import Trainer

    device = detect_device()
    dtype = device.dtype if config.target.dtype == "auto" else config.target.dtype
    torch.manual_seed(config.train.seed)
    target_model = TargetModel.load(target, dtype, device)
    started = time.monotonic()
    stores = _filled_stores(config, target, target_model, aux_layer_ids, splits)
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
        measure_start=config.train.init_head is not None,
    )
    _log_coverage(trainer.coverage, config.train.window_tokens)
    trainer.run()
    export_dtype = torch.bfloat16
    with torch.no_grad():  # what is measured and reported is the exported head, rounding included
        for parameter in head.parameters():
            parameter.copy_(parameter.to(export_dtype).float())
    acceptance = held_out_acceptance(head, stores["val"], on_policy, config.train.batch_tokens)
    head.export(out_dir, export_dtype)
    num_tokens = sum(len(row.input_ids) for row in splits["train"] + splits["val"])
    manifest = HeadManifest(
        head=spec.name,
        vllm_method=spec.vllm_method,
        vllm_speculative=spec.vllm_speculative,
        num_speculative_tokens=config.head.num_speculative_tokens,
        target_name=target.name,
        target=target.fingerprint(),
        draft_vocab_size=head.draft_vocab_size,
        acceptance={**_acceptance_figures(acceptance), "on_policy": on_policy},
        acceptance_by_prompt=acceptance.accepted_by_conversation,
        provenance=provenance(
            identity=identity,
            config=dataclasses.asdict(config),
            feature_sec=feature_sec,
            feature_tok_per_sec=num_tokens / feature_sec,
            draft_vocab_coverage=covered_share(token_counts, head.draft_token_ids.tolist()),
            **_training_figures(trainer),
        ),
    )
    manifest.save(out_dir)  # last: its presence says that the head is complete
    return manifest


def _new_head(
    config: RunConfig, spec: HeadSpec, options: Any, target_model: TargetModel, token_counts: Counter[int]
) -> Any:
    """On the target's device; with the weights and the vocabulary of ``train.init_head`` where that is set."""
    import torch

    vocab_size = int(target_model.config.vocab_size)
    init_dir = Path(config.train.init_head) if config.train.init_head is not None else None
    if init_dir is not None:
        draft_ids = drafted_tokens(init_dir, vocab_size)
    else:
        size = spec.draft_vocab_size(options, vocab_size, token_counts)
        draft_ids = choose_draft_tokens(token_counts, vocab_size, size)
    head = spec.build(target_model, torch.tensor(draft_ids), options, config.head.num_speculative_tokens)
    if init_dir is not None:
        load_weights(head, init_dir)
    return head.to(target_model.device)


def _filled_stores(
    config: RunConfig,
    target: Target,
    target_model: TargetModel,
    aux_layer_ids: list[int],
    splits: dict[str, list[TokenRow]],
) -> dict[str, FeatureStore]:
    """The features of each split, within one bound for all."""
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
        stores[name].fill(max(config.train.batch_tokens, 2048), f"target features ({name})")
    return stores


def _log_coverage(reached: Coverage, window_tokens: int) -> None:
    if reached.num_windowed_rows:
        logger.info(
            "%d of %d rows are longer than train.window_tokens=%d: of each one window an epoch is drawn, and in all "
            "epochs together %.1f %% of the rows' loss positions",
            reached.num_windowed_rows, reached.num_rows, window_tokens, 100 * reached.share,
        )  # fmt: skip


def _precision(config: RunConfig, device: Device) -> str:
    if config.train.precision == "auto":
        return "bf16" if device.native_bf16 else "fp32"
    if config.train.precision not in ("bf16", "fp32"):
        raise ValueError(f"train.precision must be auto, bf16 or fp32, got {config.train.precision!r}")
    return config.train.precision


def _training_figures(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "best_step": state.best_step,
        "history": state.history,
        "coverage": {**dataclasses.asdict(trainer.coverage), "share": trainer.coverage.share},
        "train_tok_per_sec": state.num_tokens / state.train_sec if state.train_sec else None,
        "train_sec": state.train_sec,
    }


def _acceptance_figures(acceptance: HeldOutAcceptance) -> dict[str, Any]:
    return {
        **_figures(acceptance.total),
        "by_span": {name: _figures(counts) for name, counts in acceptance.by_span.items()},
        "by_output_position": _figures_along(acceptance.by_output_position),
    }


def _figures(counts: AcceptanceCounts) -> dict[str, Any]:
    return {
        **dataclasses.asdict(counts),
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "per_position_rates": counts.per_position_rates,
    }


def _figures_along(counts: dict[int, AcceptanceCounts]) -> list[dict[str, Any]]:
    ends = dict(itertools.pairwise(OUTPUT_BUCKET_TOKENS))
    return [{"start": start, "end": ends.get(start), **_figures(counts[start])} for start in sorted(counts)]
