"""A head's files as they lie on disk: the config and the tensors' names, shapes and, of integers, values."""

from __future__ import annotations

import array
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.safetensors_header import TORCH_DTYPES, TensorEntry, read_header

INTEGERS = {"I64": "q", "I32": "i", "BOOL": "b"}
# Of a training run, not of a model; vLLM passes over them too.
NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
SPELLED = {f"torch.{theirs}": name for name, theirs in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFacts:
    """What the doctor looks at."""

    dtype: str  # as safetensors spells it: BF16, I64, ...
    shape: tuple[int, ...]
    values: list[int] | None  # of an I64, I32 or BOOL tensor


@dataclass(frozen=True, kw_only=True)
class HeadFiles:
    """A head directory."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorFacts]

    @classmethod
    def read(cls, directory: Path) -> HeadFiles:
        """Read config and headers. No weight is loaded, and torch only for a head without safetensors.

        Raises:
            ValueError: the directory, its config or its weights are missing or damaged.
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
        return cls(directory=directory, config=config, tensors=dict(_all_tensors(directory)))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor; None when there is none of that name."""
        entry = self.tensors.get(name)
        return None if entry is None else entry.shape

    def integers(self, name: str) -> list[int] | None:
        """Values of an I64, I32 or BOOL tensor; None for another dtype."""
        return self.tensors[name].values


def _all_tensors(directory: Path) -> Iterator[tuple[str, TensorFacts]]:
    """From the safetensors, else from PyTorch's own files: as vLLM chooses."""
    if shards := sorted(directory.glob("*.safetensors")):
        for shard in shards:
            for name, entry in read_header(shard).items():
                yield name, TensorFacts(dtype=entry.dtype, shape=entry.shape, values=_integers(entry))
        return
    for kind in ("*.bin", "*.pt"):
        if pickled := sorted(path for path in directory.glob(kind) if path.name not in NO_WEIGHTS):
            for path in pickled:
                yield from _pickled_tensors(path)
            return
    raise ValueError(f"{directory} holds no weights: no .safetensors, no .bin, no .pt")


def _integers(entry: TensorEntry) -> list[int] | None:
    if entry.dtype not in INTEGERS:
        return None
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        values = array.array(INTEGERS[entry.dtype], file.read(entry.end - entry.start))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


def _pickled_tensors(path: Path) -> Iterator[tuple[str, TensorFacts]]:
    """Of a file of ``torch.save``: nothing in it is executed."""
    import torch

    try:
        is_archive = _begins_with(path, b"PK")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        tensors = {str(name): tensor.detach() for name, tensor in loaded.items()}
    except Exception as error:  # torch has many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no weights that can be read ({reason}); save them as safetensors") from error
    for name, tensor in tensors.items():
        dtype = SPELLED.get(str(tensor.dtype), str(tensor.dtype))
        values = [int(value) for value in tensor.tolist()] if dtype in INTEGERS and tensor.dim() == 1 else None
        yield name, TensorFacts(dtype=dtype, shape=tuple(tensor.shape), values=values)


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark
