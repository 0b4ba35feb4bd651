"""The frozen target's forward in plain transformers, once per row: what draft heads learn from.

Features of all rows are computed before training and kept, in memory or in ``train.feature_cache_dir``, while they fit
``train.feature_cache_gib``; rows beyond the bound are computed again whenever they are drawn. Nothing else about
training changes with the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from draft_training.collate import collate
from draft_training.feature_cache import FeatureCache, RowFeatures
from draft_training.heads import FeatureBatch
from draft_training.target_model import TargetModel
from draft_training.windows import Window, whole_row
from specdec.progress import progress_bar
from specdec.traces import TokenRow

Item = TypeVar("Item")

SLAB_BYTES, SLAB_ALIGNMENT = 2**26, 64


class Slabs:
    """Copies tensors into a few large buffers.

    Kept one by one they lie strewn among each forward's large temporaries, whose memory an allocator can then neither
    use again nor give back: a gigabyte beside 50 MB of features, in some runs and not in others.
    """

    def __init__(self) -> None:
        self.buffer, self.used = torch.empty(0, dtype=torch.uint8), 0

    def copy(self, tensor: Tensor) -> Tensor:
        num_bytes = tensor.numel() * tensor.element_size()
        if self.used + num_bytes > len(self.buffer):
            size = max(SLAB_BYTES, num_bytes)
            self.buffer, self.used = torch.empty(size, dtype=torch.uint8, device=tensor.device), 0
        place = self.buffer[self.used : self.used + num_bytes]
        self.used += num_bytes + -num_bytes % SLAB_ALIGNMENT
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class FeatureStore:
    """Features by row index: of ``cache`` when there is one, else kept in memory up to a byte bound."""

    def __init__(
        self,
        target: TargetModel,
        rows: Sequence[TokenRow],
        aux_layer_ids: list[int],
        max_bytes: int,
        cache: FeatureCache | None = None,
    ) -> None:
        self.target, self.rows, self.aux_layer_ids = target, rows, aux_layer_ids
        # Read once: rows may lie on disk.
        self.lengths = [len(row.input_ids) for row in rows] if cache is None else cache.lengths
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.cache = cache
        self._kept: dict[int, RowFeatures] = {}
        self._slabs = Slabs()

    def fill(self, batch_tokens: int, description: str, indices: Iterable[int] | None = None) -> None:
        """Compute what fits the bound of these rows (None: of all), longest first, with a progress bar.

        A cache gets all rows whoever asks: processes that fill it at the same time share the work.

        Raises:
            ValueError: the cache's folder can't be written, or its disk is full.
        """

        def compute(rows: list[int], aux_layer_ids: list[int]) -> Iterator[tuple[int, RowFeatures]]:
            for group in length_groups(rows, self.lengths.__getitem__, batch_tokens):
                ids = [self.rows[i].input_ids for i in group]
                yield from zip(group, self.target.forward_rows(ids, aux_layer_ids), strict=True)

        if self.cache is not None:
            self.cache.fill(compute, self.aux_layer_ids, description)
            return
        order = sorted(
            range(len(self.rows)) if indices is None else indices, key=self.lengths.__getitem__, reverse=True
        )
        with progress_bar(description, len(order)) as advance:
            for group in length_groups(order, self.lengths.__getitem__, batch_tokens):
                if self.num_bytes >= self.max_bytes:
                    advance(len(group), "feature cache full: the rest is computed when drawn")
                    continue
                self._compute({i: self.lengths[i] for i in group})
                advance(len(group), f"{self.num_bytes / 2**20:.0f} MiB")

    def _compute(self, ends: dict[int, int]) -> dict[int, RowFeatures]:
        """Features of rows up to token ``ends``; whole rows are kept while they fit the bound."""
        ids = [self.rows[i].input_ids[:end] for i, end in ends.items()]
        computed = dict(zip(ends, self.target.forward_rows(ids, self.aux_layer_ids), strict=True))
        for index, features in computed.items():
            whole = ends[index] == self.lengths[index]
            if whole and self.cache is None and self.num_bytes + features.num_bytes <= self.max_bytes:
                self._kept[index] = RowFeatures(
                    aux_hidden=self._slabs.copy(features.aux_hidden),
                    final_hidden=self._slabs.copy(features.final_hidden),
                    logsumexp=self._slabs.copy(features.logsumexp),
                    argmax=self._slabs.copy(features.argmax),
                )
                self.num_bytes += features.num_bytes
        return computed

    @property
    def is_complete(self) -> bool:
        """Whether the target need not read a row again."""
        if self.cache is None:
            return len(self._kept) == len(self.rows)
        return all(self.cache.holds(row, self.aux_layer_ids) for row in range(len(self.rows)))

    def features(self, windows: list[Window]) -> dict[int, RowFeatures]:
        """By row, one window each: features of its tokens at least, the target having read the row from its start."""
        found: dict[int, RowFeatures | None] = {}
        for window in windows:
            index = window.row
            kept = self._kept.get(index)
            if kept is None and self.cache is not None:
                kept = self.cache.read(index, window.begin, window.end, self.aux_layer_ids)
            found[index] = kept
        missing = {window.row: window.end for window in windows if found[window.row] is None}
        computed = self._compute(missing) if missing else {}
        return {index: kept or computed[index] for index, kept in found.items()}

    def batch(self, indices: list[int]) -> FeatureBatch:
        """These rows as a whole."""
        return self.window_batch([whole_row(i, self.rows[i]) for i in indices])

    def window_batch(
        self,
        windows: list[Window],
        features: dict[int, RowFeatures] | None = None,
        pack_tokens: int | None = None,
    ) -> FeatureBatch:
        """The windows together, with ``features`` where they are at hand; see ``collate``."""
        features = self.features(windows) if features is None else features
        rows = {window.row: self.rows[window.row] for window in windows}
        return collate(windows, rows, features, self.target.device, pack_tokens)


def length_groups(order: list[Item], length: Callable[[Item], int], batch_tokens: int) -> list[list[Item]]:
    """Cut ``order`` into groups whose padded size stays within ``batch_tokens`` (one item may exceed it alone)."""
    groups: list[list[Item]] = []
    longest = 0
    for item in order:
        longest = max(longest, length(item)) if groups else length(item)
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
            longest = length(item)
    return groups
