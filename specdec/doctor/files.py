"""A head's files as they lie on disk: the config and the tensors' names, shapes and, where needed, values."""

from __future__ import annotations

import array
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 2**20
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    path: Path
    dtype: str  # as safetensors spells it: BF16, I64, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int


@dataclass(frozen=True, kw_only=True)
class HeadFiles:
    """A head directory."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @classmethod
    def read(cls, directory: Path) -> HeadFiles:
        """Read config and headers; no weight is loaded.

        Raises:
            ValueError: the directory, its config or its safetensors are missing or damaged.
        """
        path = directory / "config.json"
        if not directory.is_dir():
            raise ValueError(f"head directory {directory} does not exist; give the folder that holds config.json")
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{directory} holds no config.json: not a draft head's folder") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
        tensors: dict[str, TensorEntry] = {}
        shards = sorted(directory.glob("*.safetensors"))
        if not shards:
            raise ValueError(f"{directory} holds no .safetensors; convert its weights first")
        for shard in shards:
            tensors |= _entries(shard)
        return cls(directory=directory, config=config, tensors=tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None when there is none of that name."""
        entry = self.tensors.get(name)
        return None if entry is None else entry.shape

    def integers(self, name: str) -> list[int] | None:
        """Values of an I64, I32 or BOOL tensor; None for another dtype."""
        entry = self.tensors[name]
        codes = {"I64": "q", "I32": "i", "BOOL": "b"}
        if entry.dtype not in codes:
            return None
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            values = array.array(codes[entry.dtype], file.read(entry.end - entry.start))
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist()


def _entries(path: Path) -> dict[str, TensorEntry]:
    """The header of one file (https://github.com/huggingface/safetensors, "Format"), checked against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file; copy or export it again")
        try:
            header = json.loads(file.read(header_bytes))
            found = {
                name: TensorEntry(
                    path=path,
                    dtype=str(entry["dtype"]),
                    shape=tuple(entry["shape"]),
                    start=8 + header_bytes + entry["data_offsets"][0],
                    end=8 + header_bytes + entry["data_offsets"][1],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged header ({error}); copy or export it again") from error
    for name, entry in found.items():
        expected = math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
        if entry.end > size or (expected and entry.end - entry.start != expected):
            raise ValueError(f"{path} is truncated: tensor {name} reaches beyond its end; copy or export it again")
    return found
