"""Traces or prompts -> token-exact rows: ``train/`` and ``val/`` (Arrow), ``card.json``, ``val_prompts.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from draft_training.completions import CompletionLog, Requests, sampling_of
from draft_training.contamination import Contamination, load_contamination
from draft_training.drops import Drops
from draft_training.endpoints import generate_over_http
from draft_training.generate import generate_offline
from draft_training.ray_engines import generate_with_ray
from draft_training.row_store import held_out_groups, save_split, write_rows
from draft_training.served import check_served, served_rows
from draft_training.sources import Example, PromptGroups, describe_source, examples, filter_examples
from draft_training.tokenizer import load_tokenizer
from specdec.config import RunConfig, TracesConfig
from specdec.device import detect_device
from specdec.record import provenance, text_sha256, write_json_atomic
from specdec.targets import Target, resolve_target
from specdec.traces import TokenRow, prompt_ids, row_from_ids, tokenize_trace

logger = logging.getLogger(__name__)

CARD_NAME = "card.json"
VAL_PROMPTS_NAME = "val_prompts.jsonl"
SETTINGS_NAME = "settings.json"
# Settings that don't decide what a row holds.
PLACE_ONLY = ("max_num_seqs", "endpoints", "ray_engines", "files", "prompts", "served")

IdentifiedRow = tuple[str, TokenRow]  # the example's id, its row


def prepare(config: RunConfig, out_dir: Path) -> dict[str, Any]:
    """Make rows for ``config.target`` from ``config.traces``; returns the data card.

    Rows that exist already for the same settings are kept as they are; a killed generation continues.

    Raises:
        ValueError: bad trace or prompt files (with the line), nothing left after filtering, or an ``out_dir``
            that holds rows of other settings.
    """
    traces = config.traces
    if sum(map(bool, (traces.files, traces.prompts, traces.served))) > 1:
        raise ValueError(
            "give trace files, a prompt file or a served folder, not several: traces and served requests are read, "
            "prompts are answered"
        )
    if traces.regenerate and not traces.files:
        raise ValueError("regenerating needs traces whose prompts it can take; prompts are answered without it")
    if traces.endpoints and traces.ray_engines:
        raise ValueError("give traces.endpoints or traces.ray_engines, not both: servers answer or a Ray cluster")
    target = resolve_target(config.target)
    if traces.served:
        check_served(Path(traces.served), target)
    settings = _settings(traces, target)
    _claim(out_dir, settings)
    card_path = out_dir / CARD_NAME
    if card_path.is_file():
        logger.info("rows are ready in %s", out_dir)
        return json.loads(card_path.read_text())
    drops, groups = Drops(), PromptGroups()
    contamination = load_contamination(traces.decontaminate, traces.decontaminate_words)
    on_policy = traces.regenerate or not traces.files
    if traces.served:
        rows = _served_rows(Path(traces.served), target, contamination, groups, drops)
    else:
        kept = filter_examples(examples(traces, drops), contamination, groups, drops)
        rows = _answered_rows(config, target, kept, out_dir, drops) if on_policy else _trace_rows(target, kept)
    usable = islice(_keep_usable(rows, traces, target, drops), traces.max_rows)
    splits = _write_splits((row for _, row in usable), groups, traces, out_dir, drops)
    drops.log()
    card = {
        "on_policy": on_policy,
        "settings": settings,
        "splits": splits,
        "dropped": drops.to_dict(),
        "benchmarks": contamination.sizes,
        "provenance": provenance(target=target.name),
    }
    write_json_atomic(card_path, card)  # last: its presence says that the rows are complete
    return card


def _settings(traces: TracesConfig, target: Target) -> dict[str, Any]:
    """What decides the rows' content; another value needs another directory."""
    content = {key: value for key, value in dataclasses.asdict(traces).items() if key not in PLACE_ONLY}
    content["temperature"], content["top_p"] = sampling_of(target, traces)
    return {"target": dataclasses.asdict(target.fingerprint()), "source": describe_source(traces), **content}


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


def _served_rows(
    directory: Path, target: Target, contamination: Contamination, groups: PromptGroups, drops: Drops
) -> Iterator[IdentifiedRow]:
    for where, message, row in served_rows(directory, target, load_tokenizer(target), drops):
        benchmark = contamination.find(message)
        if benchmark is not None:
            drops.add(f"overlaps with {benchmark}", where)
            continue
        groups.add(message)
        yield where, row


def _trace_rows(target: Target, kept: Iterator[Example]) -> Iterator[IdentifiedRow]:
    tokenizer = load_tokenizer(target)
    for example in kept:
        assert example.trace is not None
        try:
            yield example.id, tokenize_trace(tokenizer, example.trace)
        except ValueError as error:
            raise ValueError(f"row {example.id}: {error}") from error


def _answered_rows(
    config: RunConfig, target: Target, kept: Iterator[Example], out_dir: Path, drops: Drops
) -> Iterator[IdentifiedRow]:
    """The target's own completions. All prompts are held in memory: the engine wants to choose their order."""
    traces = config.traces
    tokenizer = load_tokenizer(target)
    requests: Requests = {}
    identities: dict[str, str] = {}
    for example in kept:
        ids = prompt_ids(tokenizer, example.prompt)
        if len(ids) >= target.max_position_embeddings:
            drops.add("prompt fills the target's context", example.id)
            continue
        requests[example.prompt], identities[example.prompt] = ids, example.id
        if len(requests) == traces.max_rows:
            break
    log = CompletionLog(out_dir / "completions.jsonl")
    missing = log.missing(requests)
    if len(missing) < len(requests):
        logger.info("resuming: %d of %d completions are there", len(requests) - len(missing), len(requests))
    if missing and traces.endpoints:
        generate_over_http(target, traces, missing, log)
    elif missing and traces.ray_engines:
        generate_with_ray(target, config.target.dtype, traces, missing, log)
    elif missing:
        generate_offline(target, config.target.dtype, detect_device(), traces, missing, log)
    for prompt, identity in identities.items():
        item = log.finished[text_sha256(prompt)]
        yield identity, row_from_ids(tokenizer, prompt, item["prompt_ids"], item["completion_ids"])


def _keep_usable(
    rows: Iterator[IdentifiedRow], traces: TracesConfig, target: Target, drops: Drops
) -> Iterator[IdentifiedRow]:
    """Rows that fit; none is ever cut."""
    context = target.max_position_embeddings
    for identity, row in rows:
        if len(row.input_ids) > context:
            drops.add(f"longer than the target's context of {context} tokens", identity)
        elif traces.max_length is not None and len(row.input_ids) > traces.max_length:
            drops.add(f"longer than traces.max_length of {traces.max_length} tokens", identity)
        elif row.num_completion_tokens < 3:
            drops.add("fewer than 3 completion tokens", identity)
        else:
            yield identity, row


def _write_splits(
    rows: Iterator[TokenRow], groups: PromptGroups, traces: TracesConfig, out_dir: Path, drops: Drops
) -> dict[str, Any]:
    whole = out_dir / "rows.arrow"
    table = write_rows(rows, whole)
    group_of_row = [groups.group_of(identity) for identity in table["conversation_id"]] if len(table) else []
    if len(set(group_of_row)) < 2:
        raise ValueError(f"{len(table)} usable rows: training needs two different conversations; {drops.summary()}")
    held_out = held_out_groups(group_of_row, traces.val_fraction, traces.seed)
    numbers: dict[str, list[int]] = {"train": [], "val": []}
    for number, group in enumerate(group_of_row):
        numbers["val" if group in held_out else "train"].append(number)
    splits = {name: save_split(table, numbers[name], out_dir / name) for name in numbers}
    val_prompts = dict.fromkeys(filter(None, table.select(numbers["val"])["prompt"]))
    (out_dir / VAL_PROMPTS_NAME).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in val_prompts))
    whole.unlink()
    return splits
