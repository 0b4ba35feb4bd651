"""The frozen target's forward in plain transformers, once per row: what draft heads learn from.

Features of all rows are computed at the first use and kept while they fit ``train.feature_cache_gib``; rows beyond
the bound are computed again whenever they are drawn. Nothing else about training changes with the bound.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draft_training.heads import FeatureBatch
from specdec.device import Device
from specdec.progress import progress_bar
from specdec.targets import Target
from specdec.traces import TokenRow

logger = logging.getLogger(__name__)

LOGITS_CHUNK_TOKENS = 512  # bounds the [tokens, vocabulary] buffer


@dataclass(kw_only=True, slots=True)
class RowFeatures:
    """Of a row of T tokens: aux [T, A, H], final [T, H] in the target's dtype, float32 logsumexp [T], argmax [T]."""

    aux_hidden: Tensor
    final_hidden: Tensor
    logsumexp: Tensor
    argmax: Tensor

    @property
    def num_bytes(self) -> int:
        tensors = (self.aux_hidden, self.final_hidden, self.logsumexp, self.argmax)
        return sum(t.numel() * t.element_size() for t in tensors)


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

    @torch.inference_mode()
    def forward_rows(self, rows: list[list[int]], aux_layer_ids: list[int]) -> list[RowFeatures]:
        """Features of a right-padded batch of id lists."""
        lengths = [len(ids) for ids in rows]
        input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
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
        return [self._row(aux[i, :length], final[i, :length]) for i, length in enumerate(lengths)]

    def _row(self, aux: Tensor, final: Tensor) -> RowFeatures:
        logsumexps, argmaxes = [], []
        for chunk in final.split(LOGITS_CHUNK_TOKENS):
            logits = (chunk @ self.lm_head_weight.T).float()
            logsumexps.append(logits.logsumexp(-1))
            argmaxes.append(logits.argmax(-1))
        return RowFeatures(
            aux_hidden=aux.clone(),
            final_hidden=final.clone(),
            logsumexp=torch.cat(logsumexps),
            argmax=torch.cat(argmaxes),
        )


class FeatureStore:
    """Features by row index, kept up to a byte bound."""

    def __init__(self, target: TargetModel, rows: list[TokenRow], aux_layer_ids: list[int], max_bytes: int) -> None:
        self.target, self.rows, self.aux_layer_ids = target, rows, aux_layer_ids
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: dict[int, RowFeatures] = {}

    def fill(self, batch_tokens: int, description: str, indices: Iterable[int] | None = None) -> None:
        """Compute what fits the bound of these rows (None: of all), longest together, with a progress bar."""
        order = sorted(range(len(self.rows)) if indices is None else indices, key=lambda i: len(self.rows[i].input_ids))
        with progress_bar(description, len(order)) as advance:
            for group in length_groups(order, self.rows, batch_tokens):
                if self.num_bytes >= self.max_bytes:
                    advance(len(group), "feature cache full: the rest is computed when drawn")
                    continue
                self._compute(group)
                advance(len(group), f"{self.num_bytes / 2**20:.0f} MiB")

    def _compute(self, indices: list[int]) -> dict[int, RowFeatures]:
        features = self.target.forward_rows([self.rows[i].input_ids for i in indices], self.aux_layer_ids)
        computed = dict(zip(indices, features, strict=True))
        for index, row_features in computed.items():
            if self.num_bytes + row_features.num_bytes <= self.max_bytes:
                self._kept[index] = row_features
                self.num_bytes += row_features.num_bytes
        return computed

    def batch(self, indices: list[int]) -> FeatureBatch:
        """The features of these rows, right-padded together, float32."""
        missing = [i for i in indices if i not in self._kept]
        computed = self._compute(missing) if missing else {}
        rows = [self.rows[i] for i in indices]
        features = [self._kept.get(i) or computed[i] for i in indices]
        device = self.target.device

        def pad(tensors: list[Tensor]) -> Tensor:
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)

        anchors = [anchor_positions(row) for row in rows]
        return FeatureBatch(
            anchors_BQ=pad([torch.tensor(row_anchors) for row_anchors in anchors]),
            anchor_mask_BQ=pad([torch.ones(len(row_anchors), dtype=torch.bool) for row_anchors in anchors]),
            input_ids_BT=pad([torch.tensor(row.input_ids) for row in rows]),
            loss_mask_BT=pad([torch.tensor(row.loss_mask, dtype=torch.bool) for row in rows]),
            lengths_B=torch.tensor([len(row.input_ids) for row in rows], device=device),
            aux_hidden_BTAH=pad([f.aux_hidden for f in features]).float(),
            final_hidden_BTH=pad([f.final_hidden for f in features]).float(),
            logsumexp_BT=pad([f.logsumexp for f in features]),
            argmax_BT=pad([f.argmax for f in features]),
        )


def anchor_positions(row: TokenRow) -> list[int]:
    """Indices t at which the server could draft: tokens t + 1 (just sampled) and t + 2 belong to the completion."""
    mask = row.loss_mask
    return [t for t in range(len(mask) - 2) if mask[t + 1] and mask[t + 2]]


def length_groups(order: list[int], rows: list[TokenRow], batch_tokens: int) -> list[list[int]]:
    """Cut ``order`` into groups whose padded size stays within ``batch_tokens`` (one row may exceed it alone)."""
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, len(rows[index].input_ids)) if groups else len(rows[index].input_ids)
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = len(rows[index].input_ids)
    return groups
