"""Rows on disk: written one by one, split by groups of conversations, described, loaded."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from specdec.record import text_sha256
from specdec.traces import TokenRow

BATCH_ROWS = 64  # held in memory; a long chain of thought is megabytes of Python integers


def write_rows(rows: Iterable[TokenRow], path: Path) -> Any:
    """One Arrow file of all rows, opened as a memory-mapped table."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    span = List(Value("int32"))
    features = Features(
        conversation_id=Value("string"),
        prompt=Value("large_string"),
        input_ids=List(Value("int32")),
        prompt_span=span,
        think_span=span,
        answer_span=span,
        loss_mask=List(Value("int8")),
    )
    with ArrowWriter(features=features, path=str(path), writer_batch_size=BATCH_ROWS) as writer:
        for row in rows:
            writer.write({field.name: getattr(row, field.name) for field in dataclasses.fields(row)})
        writer.finalize()
    return Dataset.from_file(str(path))


def held_out_groups(groups: Iterable[str], val_fraction: float, seed: int) -> set[str]:
    """The groups of the validation split: the same for the same arguments, at least one, never all."""
    order = sorted(set(groups), key=lambda group: text_sha256(str(seed), group))
    return set(order[: min(max(1, round(val_fraction * len(order))), len(order) - 1)])


def save_split(table: Any, numbers: list[int], directory: Path) -> dict[str, Any]:
    """Write the rows of these numbers as a split; returns what the data card says of it."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    part = table.select(numbers)
    part.save_to_disk(directory)
    return _describe(part)


def _describe(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    lengths, conversations, completion_tokens, think_tokens = [], set(), 0, 0
    digest = hashlib.sha256()
    for row in rows:
        lengths.append(len(row["input_ids"]))
        conversations.add(row["conversation_id"])
        completion_tokens += len(row["input_ids"]) - row["prompt_span"][1]
        think_tokens += row["think_span"][1] - row["think_span"][0]
        digest.update(json.dumps(row["input_ids"]).encode())
    return {
        "rows": len(lengths),
        "conversations": len(conversations),
        "tokens": sum(lengths),
        "completion_tokens": completion_tokens,
        "think_tokens": think_tokens,
        "length_median": statistics.median(lengths) if lengths else None,
        "length_max": max(lengths, default=None),
        "input_ids_sha256": digest.hexdigest(),
    }


class StoredRows(Sequence[TokenRow]):
    """Rows of one split. Each is read from its memory-mapped file when it is asked for: sets may exceed memory."""

    def __init__(self, batches: list[Any]) -> None:
        """Arrow's record batches, in order."""
        self._batches = batches
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        place = bisect.bisect_right(self._ends, number)
        batch = self._batches[place]
        [item] = batch.slice(number - self._ends[place] + batch.num_rows, 1).to_pylist()
        return _row(item)


def _row(item: dict[str, Any]) -> TokenRow:
    spans = {name: tuple(item[name]) for name in ("prompt_span", "think_span", "answer_span")}
    return TokenRow(**{**item, **spans})


def load_rows(directory: Path) -> StoredRows:
    """Rows of one split.

    Raises:
        ValueError: not a directory that ``prepare`` wrote.
    """
    import pyarrow as pa  # reads what datasets wrote, at a fraction of its memory
    from pyarrow.ipc import open_stream

    try:
        files = [
            directory / file["filename"] for file in json.loads((directory / "state.json").read_text())["_data_files"]
        ]
        return StoredRows([batch for file in files for batch in open_stream(pa.memory_map(str(file)))])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} holds no rows ({error}); make them with `specdec prepare`") from error
