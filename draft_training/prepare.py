"""Traces or prompts -> token-exact rows: ``train/`` and ``val/`` (Arrow), ``card.json``, ``val_prompts.jsonl``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from draft_training.generate import generate_completions
from draft_training.prompts import EMBEDDED_TASKS, embedded_prompts
from specdec.config import RunConfig, TracesConfig
from specdec.device import detect_device
from specdec.record import provenance, text_sha256, write_json_atomic
from specdec.targets import Target, resolve_target
from specdec.traces import TokenRow, prompt_ids, read_prompts, read_traces, row_from_ids, tokenize_trace

logger = logging.getLogger(__name__)

CARD_NAME = "card.json"
VAL_PROMPTS_NAME = "val_prompts.jsonl"
SETTINGS_NAME = "settings.json"


def prepare(config: RunConfig, out_dir: Path) -> dict[str, Any]:
    """Make rows for ``config.target`` from ``config.traces``; returns the data card.

    Rows that exist already for the same settings are kept as they are; a killed generation continues.

    Raises:
        ValueError: bad trace or prompt files (with the line), nothing left after filtering, or an ``out_dir``
            that holds rows of other settings.
    """
    traces = config.traces
    if traces.files and traces.prompts:
        raise ValueError("give trace files or a prompt file, not both: traces are read, prompts are answered")
    target = resolve_target(config.target)
    settings = _settings(config, target)
    _claim(out_dir, settings)
    card_path = out_dir / CARD_NAME
    if card_path.is_file():
        logger.info("rows are ready in %s", out_dir)
        return json.loads(card_path.read_text())
    dropped: Counter[str] = Counter()
    rows = _trace_rows(target, traces) if traces.files else _generated_rows(config, target, out_dir)
    kept = list(_keep_usable(rows, traces, target, dropped))
    if len({row.conversation_id for row in kept}) < 2:
        raise ValueError(f"{len(kept)} usable rows ({dict(dropped)} dropped): training needs two conversations or more")
    train, val = split_rows(kept, traces.val_fraction, traces.seed)
    _save_rows(train, out_dir / "train")
    _save_rows(val, out_dir / "val")
    val_prompts = dict.fromkeys(row.prompt for row in val)
    (out_dir / VAL_PROMPTS_NAME).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in val_prompts))
    card = {
        "on_policy": not traces.files,
        "settings": settings,
        "splits": {"train": _describe(train), "val": _describe(val)},
        "dropped": dict(dropped),
        "provenance": provenance(target=target.name),
    }
    write_json_atomic(card_path, card)  # last: its presence says that the rows are complete
    return card


def _settings(config: RunConfig, target: Target) -> dict[str, Any]:
    """What decides the rows' content; another value needs another directory."""
    traces = dataclasses.asdict(config.traces)
    traces.pop("max_num_seqs")
    if config.traces.temperature is None:
        traces["temperature"] = target.sampling.get("temperature")
    if config.traces.top_p is None:
        traces["top_p"] = target.sampling.get("top_p")
    if config.traces.files:
        files = {Path(file).name: hashlib.sha256(_read_bytes(file)).hexdigest() for file in config.traces.files}
        source: Any = {"traces": files}
    elif config.traces.prompts:
        source = {"prompts": hashlib.sha256(_read_bytes(config.traces.prompts)).hexdigest()}
    else:
        source = {"tasks": list(EMBEDDED_TASKS)}
    traces.pop("files"), traces.pop("prompts")
    return {"target": dataclasses.asdict(target.fingerprint()), "source": source, **traces}


def _read_bytes(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; check the path") from error


def _claim(out_dir: Path, settings: dict[str, Any]) -> None:
    path = out_dir / SETTINGS_NAME
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier != settings:
            differing = [key for key in settings if earlier.get(key) != settings[key]]
            names = ", ".join(differing)
            raise ValueError(f"{out_dir} holds rows of other settings ({names}); pass another --out or delete it")
    else:
        write_json_atomic(path, settings)


def load_tokenizer(target: Target) -> Any:
    """The target's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(target.path)


def _trace_rows(target: Target, traces: TracesConfig) -> Iterable[TokenRow]:
    tokenizer = load_tokenizer(target)
    for file in traces.files:
        for trace in read_traces(Path(file)):
            yield tokenize_trace(tokenizer, trace)


def _generated_rows(config: RunConfig, target: Target, out_dir: Path) -> Iterable[TokenRow]:
    traces = config.traces
    tokenizer = load_tokenizer(target)
    if traces.prompts:
        prompts = read_prompts(Path(traces.prompts))
    else:
        prompts = embedded_prompts(traces.num_prompts, traces.seed)
    requests = {prompt: prompt_ids(tokenizer, prompt) for prompt in prompts}
    device = detect_device()
    dtype = device.dtype if config.target.dtype == "auto" else config.target.dtype
    finished = generate_completions(target, dtype, device, traces, requests, out_dir / "completions.jsonl")
    for prompt in requests:
        item = finished[text_sha256(prompt)]
        yield row_from_ids(tokenizer, prompt, item["prompt_ids"], item["completion_ids"])


def _keep_usable(
    rows: Iterable[TokenRow], traces: TracesConfig, target: Target, dropped: Counter[str]
) -> Iterable[TokenRow]:
    longest = min(traces.max_length, target.max_position_embeddings)
    for row in rows:
        if len(row.input_ids) > longest:
            dropped[f"longer than {longest} tokens"] += 1
        elif row.num_completion_tokens < 3:
            dropped["fewer than 3 completion tokens"] += 1
        else:
            yield row
    for reason, count in dropped.items():
        logger.warning("dropped %d rows: %s", count, reason)


def split_rows(rows: list[TokenRow], val_fraction: float, seed: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Split by conversation, so that no prompt is on both sides; at least one conversation on each."""
    order = sorted({row.conversation_id for row in rows}, key=lambda identity: text_sha256(str(seed), identity))
    num_val = min(max(1, round(val_fraction * len(order))), len(order) - 1)
    held_out = set(order[:num_val])
    train = [row for row in rows if row.conversation_id not in held_out]
    val = [row for row in rows if row.conversation_id in held_out]
    return train, val


def _save_rows(rows: list[TokenRow], directory: Path) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(TokenRow)}
    Dataset.from_dict(columns).save_to_disk(directory)


def load_rows(directory: Path) -> list[TokenRow]:
    """Rows of one split.

    Raises:
        ValueError: not a directory that ``prepare`` wrote.
    """
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(directory))
    except Exception as error:  # datasets raises its own kinds for missing and damaged files
        raise ValueError(f"{directory} holds no rows ({error}); make them with `specdec prepare`") from error
    rows = []
    for item in table.to_list():
        for span in ("prompt_span", "think_span", "answer_span"):
            item[span] = tuple(item[span])
        rows.append(TokenRow(**item))
    return rows


def _describe(rows: list[TokenRow]) -> dict[str, Any]:
    lengths = sorted(len(row.input_ids) for row in rows)
    digest = hashlib.sha256(json.dumps([row.input_ids for row in rows]).encode()).hexdigest()
    return {
        "rows": len(rows),
        "conversations": len({row.conversation_id for row in rows}),
        "tokens": sum(lengths),
        "completion_tokens": sum(row.num_completion_tokens for row in rows),
        "think_tokens": sum(row.think_span[1] - row.think_span[0] for row in rows),
        "length_median": statistics.median(lengths) if lengths else None,
        "length_max": lengths[-1] if lengths else None,
        "input_ids_sha256": digest,
    }
