"""What a safetensors file says that it holds, and whether it does. Loads no weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER_BYTES = 100 * 2**20
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    path: Path
    dtype: str  # as safetensors spells it: BF16, I64, ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The header of one file (https://github.com/huggingface/safetensors, "Format"), checked against its size.

    Raises:
        ValueError: it is truncated, damaged, or no such file.
    """
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
