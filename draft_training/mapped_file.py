"""A safetensors file mapped into memory, of which nothing stays there that was read.

Pages that a process has touched count as its own until they are dropped: a cache larger than memory looks like a leak
then, and a container that counts them throttles. The system keeps them for the next reader anyway.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specdec.safetensors_header import TORCH_DTYPES, read_header


class MappedFile:
    """The tensors of one file.

    Raises:
        ValueError: it is truncated, damaged, or no such file.
    """

    def __init__(self, path: Path) -> None:
        self._entries = read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """A copy of rows ``begin`` .. ``end`` of a tensor."""
        entry = self._entries[name]
        rows = torch.empty((end - begin, *entry.shape[1:]), dtype=getattr(torch, TORCH_DTYPES[entry.dtype]))
        row_bytes = (entry.end - entry.start) // entry.shape[0]
        read = np.frombuffer(self._map, np.uint8, rows.nbytes, entry.start + begin * row_bytes)
        rows.view(torch.uint8).view(-1).numpy()[:] = read
        self._map.madvise(mmap.MADV_DONTNEED)
        return rows
