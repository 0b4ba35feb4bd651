"""The one reader of rows: files, folders of files and Hugging Face data sets, lazily, each row with its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.hub_rows import HUB_PREFIX, hub_rows, parse_hub_name
from specdec.row_files import FORMATS, format_of

Row = dict[str, Any]


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` names a data set of the hub rather than a path."""
    return str(source).startswith(HUB_PREFIX)


def read_rows(source: str | Path, default_split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yield ("FILE line N", row) of a file, of every file of a folder, or of ``hf:ORG/NAME[:CONFIG][@SPLIT]``.

    Rows are read as they are asked for, so a set may be larger than memory. ``default_split`` is taken of a hub data
    set that has several when none is named. A text file gives ``{"prompt": line}``.

    Raises:
        ValueError: missing, unreadable or empty source, unknown format or split, no network, or a row that is no
            object; names the file and the line.
    """
    found = False
    for place, row in _rows(source, default_split):
        found = True
        yield place, row
    if not found:
        raise ValueError(f"{source} is empty; it needs one row (an object, or a prompt in a text file) a line")


def source_files(source: str | Path) -> list[Path]:
    """The files behind a path, sorted.

    Of a folder: its JSONL and Parquet files, at any depth; its .json files only when there are no others, because a
    snapshot of the hub keeps its own notes in .json files.

    Raises:
        ValueError: nothing there, or nothing that can be read.
    """
    path = Path(source)
    if path.is_file():
        format_of(path)
        return [path]
    known = ", ".join(FORMATS)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; pass a file or folder ({known}), or {HUB_PREFIX}ORG/NAME")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(tuple(FORMATS)))
    rows = [file for file in found if not file.name.endswith((".json", ".json.gz", ".txt"))]
    if not (rows or found):
        raise ValueError(f"{path} holds no file of rows; want {known}")
    return rows or [file for file in found if not file.name.endswith(".txt")] or found


def _rows(source: str | Path, default_split: str) -> Iterator[tuple[str, Row]]:
    if is_hub_name(source):
        yield from hub_rows(parse_hub_name(str(source)), default_split)
        return
    for file in source_files(source):
        for place, row in format_of(file)(file):
            if not isinstance(row, dict):
                raise ValueError(f"{place}: want a JSON object, got {type(row).__name__}")
            yield place, row
