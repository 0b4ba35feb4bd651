"""The frozen target's forward in plain transformers, once per row: what draft heads learn from.

Features of all rows are computed before training and kept, in memory or in ``train.feature_cache_dir``, while they fit
``train.feature_cache_gib``; rows beyond the bound are computed again whenever they are drawn. Nothing else about
training changes with the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.feature_cache import FeatureCache, RowFeatures
from draft_training.heads import FeatureBatch
from draft_training.windows import Window, anchor_positions, whole_row
from specdec.device import Device
from specdec.progress import progress_bar
from specdec.targets import Target
from specdec.traces import TokenRow

Item = TypeVar("Item")

LOGITS_CHUNK_TOKENS = 128  # bounds the [tokens, vocabulary] buffer
SLAB_BYTES, SLAB_ALIGNMENT = 2**26, 64
LENGTHS_PER_OCTAVE = 8


def padded_length(length: int) -> int:
    """The next of eight lengths an octave. On a CPU the kernels of each new shape stay for good, a megabyte each."""
    step = max(1, (1 << length.bit_length()) // (2 * LENGTHS_PER_OCTAVE))
    return length + -length % step


class TargetModel:
    """The frozen target with taps on some of its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config: Any = model.config
        self.decoder = model.get_decoder()
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.lm_head_weight: Tensor = model.get_output_embeddings().weight
        self.final_norm_weight: Tensor = self.decoder.norm.weight

    @classmethod
    def load(cls, target: Target, dtype: str, device: Device) -> TargetModel:
        """Read the target's weights in ``dtype`` onto ``device``."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            target.path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        return cls(model.to(device.kind))

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def drop_layers(self) -> None:
        """Give back the memory of all but what heads are built from; no row can be read any more."""
        is_tied = self.lm_head_weight.data_ptr() == self.embedding.data_ptr()
        self.embedding = self.embedding.clone()  # out of the file's mapping, which stays whole otherwise
        self.lm_head_weight = self.embedding if is_tied else self.lm_head_weight.clone()
        self.final_norm_weight = self.final_norm_weight.clone()
        del self.model, self.decoder

    @torch.inference_mode()
    def forward_rows(self, rows: list[list[int]], aux_layer_ids: list[int]) -> list[RowFeatures]:
        """Features of a right-padded batch of id lists."""
        lengths = [len(ids) for ids in rows]
        input_ids = torch.zeros(len(rows), padded_length(max(lengths)), dtype=torch.long)
        for i, ids in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
        taps: dict[int, Tensor] = {}

        def tap(layer_id: int):
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                taps[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        # After layer index k - 1 the residual stream has passed k layers.
        hooks = [self.decoder.layers[k - 1].register_forward_hook(tap(k)) for k in aux_layer_ids]
        try:
            # Right padding under a causal mask needs no attention mask: no real token sees a pad.
            final = self.decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        # A head that taps no layer stores nothing for it: A = 0.
        aux = torch.stack([taps[k] for k in aux_layer_ids], dim=2) if aux_layer_ids else final[:, :, None][:, :, :0]
        return [self._row(aux[i], final[i], length) for i, length in enumerate(lengths)]

    def _row(self, aux: Tensor, final: Tensor, length: int) -> RowFeatures:
        """Of a padded row."""
        logsumexps, argmaxes = [], []
        for chunk in final[: padded_length(length)].split(LOGITS_CHUNK_TOKENS):
            logits = (chunk @ self.lm_head_weight.T).float()
            logsumexps.append(logits.logsumexp(-1))
            argmaxes.append(logits.argmax(-1))
        return RowFeatures(
            aux_hidden=aux[:length],
            final_hidden=final[:length],
            logsumexp=torch.cat(logsumexps)[:length],
            argmax=torch.cat(argmaxes)[:length],
        )


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

    def window_batch(self, windows: list[Window], features: dict[int, RowFeatures] | None = None) -> FeatureBatch:
        """The windows right-padded together, features in float32, from ``features`` where they are at hand.

        The loss mask is cut to what the windows' anchors draft.
        """
        features = self.features(windows) if features is None else features
        device = self.target.device

        def pad(tensors: Iterable[Tensor]) -> Tensor:
            padded = nn.utils.rnn.pad_sequence([t.to(device) for t in tensors], batch_first=True)
            missing = padded_length(padded.shape[1]) - padded.shape[1]
            return F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing))

        def padded(name: str) -> Tensor:
            of_windows = ((window, features[window.row]) for window in windows)
            return pad(getattr(f, name)[w.begin - f.begin : w.end - f.begin] for w, f in of_windows)

        rows = [self.rows[window.row] for window in windows]
        anchors = [torch.tensor(window_anchors(w, row), dtype=torch.long) for w, row in zip(windows, rows, strict=True)]
        masks = [torch.tensor(row.loss_mask[w.begin : w.end]).bool() for w, row in zip(windows, rows, strict=True)]
        for window, mask in zip(windows, masks, strict=True):
            mask[: max(0, window.first + 2 - window.begin)] = False
        return FeatureBatch(
            anchors_BQ=pad(anchors),
            anchor_mask_BQ=pad(torch.ones(len(row_anchors), dtype=torch.bool) for row_anchors in anchors),
            input_ids_BT=pad(torch.tensor(r.input_ids[w.begin : w.end]) for w, r in zip(windows, rows, strict=True)),
            loss_mask_BT=pad(masks),
            begins_B=torch.tensor([window.begin for window in windows], device=device),
            lengths_B=torch.tensor([window.num_tokens for window in windows], device=device),
            aux_hidden_BTAH=padded("aux_hidden").float(),
            final_hidden_BTH=padded("final_hidden").float(),
            logsumexp_BT=padded("logsumexp"),
            argmax_BT=padded("argmax"),
        )


def window_anchors(window: Window, row: TokenRow) -> list[int]:
    """The anchors of a window, counted from its first token."""
    return [t - window.begin for t in anchor_positions(row) if window.first <= t < window.stop]


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
