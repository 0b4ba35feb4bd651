"""A head's files as they lie on disk: the config and the tensors' names, shapes and, where needed, values."""

from __future__ import annotations

import array
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.safetensors_header import TensorEntry, read_header


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
            tensors |= read_header(shard)
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
