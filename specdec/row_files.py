"""The file formats of rows: JSON Lines, JSON, Parquet and plain text. Each reader yields ("FILE line N", value)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

CHUNK_CHARS = 1 << 20
BATCH_ROWS = 256

FileReader = Callable[[Path], Iterator[tuple[str, Any]]]


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:  # U+2028 inside a text ends no line
        yield file


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path} line {number}", line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} after line {number}: {error}; want UTF-8 text, gzipped if it ends in .gz") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON Lines; blank lines are skipped."""
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}); fix or remove the line") from error


def read_text(path: Path) -> Iterator[tuple[str, Any]]:
    """A prompt a line."""
    for where, line in _lines(path):
        yield where, {"prompt": line.strip()}


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """An array of objects, read element by element; an object of equally long arrays; or JSON Lines by another name."""
    try:
        with _open_text(path) as file:
            head = file.read(CHUNK_CHARS)
            while head.isspace() and (more := file.read(CHUNK_CHARS)):
                head = more
            if head.lstrip().startswith("["):
                yield from _array_elements(path, file, head.lstrip()[1:])
                return
            text = head + file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; want UTF-8 text, gzipped if it ends in .gz") from error
    try:
        tree = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from read_jsonl(path)
            return
        raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error
    yield from _columns(path, tree)


def _array_elements(path: Path, file: TextIO, buffer: str) -> Iterator[tuple[str, Any]]:
    """Elements of an array whose opening bracket has been read; at most one chunk more than an element is held."""
    decoder = json.JSONDecoder()
    number, wanted = 0, CHUNK_CHARS
    while True:
        buffer = buffer.lstrip().removeprefix(",").lstrip() if number else buffer.lstrip()
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
            if end == len(buffer):  # a number or a word might go on
                raise json.JSONDecodeError("the array never closes", buffer, end)
        except json.JSONDecodeError as error:
            more = file.read(wanted)
            if not more:
                raise ValueError(f"{path} element {number + 1}: not JSON ({error.msg})") from error
            buffer, wanted = buffer + more, 2 * wanted  # doubling: a long element is parsed a few times only
            continue
        number, wanted, buffer = number + 1, CHUNK_CHARS, buffer[end:]
        yield f"{path} element {number}", value


def _columns(path: Path, tree: Any) -> Iterator[tuple[str, Any]]:
    columns = tree if isinstance(tree, dict) else {"": tree}
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) > 1 or -1 in lengths:
        raise ValueError(f"{path}: want an array of objects, or an object of arrays of one length")
    for number in range(max(lengths, default=0)):
        yield f"{path} row {number + 1}", {name: column[number] for name, column in columns.items()}


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Parquet, a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} after row {number}: not readable as Parquet ({error})") from error


FORMATS: dict[str, FileReader] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".json.gz": read_json,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def format_of(path: Path) -> FileReader:
    """The reader for a file's name.

    Raises:
        ValueError: no format of ours.
    """
    for suffix, reader in FORMATS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path}: unknown format; want a name that ends in {', '.join(FORMATS)}")
