"""Decoder layers of heads that attend, numerically vLLM's, computed for many anchors at once.

Shapes: B rows, T tokens, Q anchors, H width, W attention input, N query heads, M key/value heads, D head width.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from draft_training.padding import padded_length

MAX_SCORES = 2**27  # of one attention at once: with a softmax beside them a gigabyte in float32
STRETCH_ANCHORS = 256  # scored at once, against no more keys than they can see


class Stretch(NamedTuple):
    """Some of a batch's anchors, and the keys that at least one of them attends to."""

    anchors: slice
    keys: slice
    bias_BQT: Tensor  # 0 where an anchor may attend to, and as good as minus infinity elsewhere


class PrefixAttention(nn.Module):
    """Causal attention of draft positions: true features up to the anchor, the anchor's own drafts after it."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def _rope(self, states_BXTD: Tensor, positions_BT: Tensor) -> Tensor:
        cos, sin = (part[:, None] for part in self.rotary(states_BXTD, positions_BT))
        return states_BXTD * cos + rotate_half(states_BXTD) * sin

    def query(self, inputs_BQW: Tensor, positions_BQ: Tensor) -> Tensor:
        """[B, N, Q, D], rope applied."""
        q = self.q_proj(inputs_BQW).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._rope(q, positions_BQ)

    def key_value(self, inputs_BTW: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Two of [B, M, T, D], rope applied to the keys."""
        k = self.k_proj(inputs_BTW).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(inputs_BTW).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self._rope(k, positions_BT), v

    def stretches(self, anchors_BQ: Tensor, starts_BT: Tensor, num_own: int, dtype: torch.dtype) -> list[Stretch]:
        """The anchors, as many at once as ``STRETCH_ANCHORS`` and ``MAX_SCORES`` allow, with what they attend to."""
        (B, Q), T = anchors_BQ.shape, starts_BT.shape[1]
        num_heads = self.num_kv_heads * self.num_groups
        size = max(1, min(STRETCH_ANCHORS, MAX_SCORES // (B * num_heads * (T + num_own))))
        parts = [slice(first, first + size) for first in range(0, Q, size)]
        starts_BQ = starts_BT.gather(1, anchors_BQ)
        bounds = [[0, T - 1]]
        if len(parts) > 1:
            ends = [torch.stack([starts_BQ[:, part].min(), anchors_BQ[:, part].max()]) for part in parts]
            bounds = torch.stack(ends).tolist()
        found = []
        for part, (first, last) in zip(parts, bounds, strict=True):
            keys = slice(first, min(T, first + padded_length(last + 1 - first)))
            seen_BQT = visible(anchors_BQ[:, part], starts_BQ[:, part], keys)
            bias_BQT = torch.zeros_like(seen_BQT, dtype=dtype).masked_fill_(~seen_BQT, torch.finfo(dtype).min)
            found.append(Stretch(part, keys, bias_BQT))
        return found

    def forward(
        self,
        q_BNQD: Tensor,
        prefix: tuple[Tensor, Tensor],
        own: list[tuple[Tensor, Tensor]],
        stretches: list[Stretch],
    ) -> Tensor:
        """Attend to the row's ``prefix`` and to this anchor's ``own`` keys alone. Returns [B, Q, H].

        More than ``MAX_SCORES`` in all are made again for the gradient, stretch by stretch.
        """
        B, N, _, _ = q_BNQD.shape
        num_scores = B * N * sum(s.bias_BQT.shape[1] * (s.bias_BQT.shape[2] + len(own)) for s in stretches)
        mixed = []
        for part, keys, bias_BQT in stretches:
            own_part = [(key[:, :, part], value[:, :, part]) for key, value in own]
            prefix_part = prefix[0][:, :, keys], prefix[1][:, :, keys]
            arguments = q_BNQD[:, :, part], prefix_part, own_part, bias_BQT
            if num_scores <= MAX_SCORES:
                mixed.append(self._mix(*arguments))
            else:
                mixed.append(checkpoint(self._mix, *arguments, use_reentrant=False, preserve_rng_state=False))
        return self.o_proj(torch.cat(mixed, dim=1))

    def _mix(
        self, q_BNQD: Tensor, prefix: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]], bias_BQT: Tensor
    ) -> Tensor:
        """[B, Q, N * D]: the values, weighted."""
        B, N, Q, D = q_BNQD.shape
        q = (q_BNQD * D**-0.5).reshape(B, self.num_kv_heads, self.num_groups * Q, D)
        scores = (q @ prefix[0].transpose(-1, -2)).view(B, N, Q, -1) + bias_BQT[:, None]
        grouped = q.view(B, self.num_kv_heads, self.num_groups, Q, D)
        own_scores = [(grouped * key[:, :, None]).sum(-1, keepdim=True).view(B, N, Q, 1) for key, _ in own]
        probs = torch.cat([scores, *own_scores], dim=-1).softmax(-1).to(q.dtype)
        T = prefix[0].shape[2]
        mixed = probs[..., :T].reshape(B, self.num_kv_heads, self.num_groups * Q, T) @ prefix[1]
        mixed = mixed.view(B, self.num_kv_heads, self.num_groups, Q, D)
        for j, (_, value) in enumerate(own):
            weight = probs[..., T + j].view(B, self.num_kv_heads, self.num_groups, Q, 1)
            mixed = mixed + weight * value[:, :, None]
        return mixed.view(B, N, Q, D).transpose(1, 2).flatten(2)

    def causal(self, q_BNTD: Tensor, prefix: tuple[Tensor, Tensor], starts_BT: Tensor) -> Tensor:
        """Every position attends to itself and what precedes it in its row. Returns [B, T, H].

        With one row a strip in memory linear in T.
        """
        keys, values = (part.repeat_interleave(self.num_groups, dim=1) for part in prefix)
        mask = None
        if starts_BT.any():
            T = starts_BT.shape[1]
            everywhere_BT = torch.arange(T, device=starts_BT.device).expand_as(starts_BT)
            mask = visible(everywhere_BT, starts_BT, slice(0, T))[:, None]
        mixed = F.scaled_dot_product_attention(q_BNTD, keys, values, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Attention on inputs of ``width``, then the MLP; tensor names are vLLM's."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = PrefixAttention(config, width)
        self.mlp = LlamaMLP(config)

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        """What follows attention: the residual stream after the layer."""
        residual = residual + attended
        return residual + self.mlp(self.post_attention_layernorm(residual))


class FusedFeatureLayer(DecoderLayer):
    """The first layer of EAGLE-3 and P-EAGLE: it attends on the token's embedding beside the fused features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, 2 * config.hidden_size)
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Attention input [..., 2H] and the residual stream [..., H]."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        return torch.cat([self.input_layernorm(embeds), normed], dim=-1), residual


class FeatureFusion(nn.Module):
    """A mixin: the tapped features of all layers through one matrix, normed before it on demand."""

    config: Any

    def add_fusion(self, config: Any) -> None:
        """Make the modules, under the names that vLLM gives them."""
        width = config.target_hidden_size * len(config.eagle_aux_hidden_state_layer_ids)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.fc = nn.Linear(width, config.hidden_size, bias=False)

    def fuse(self, flat: Tensor) -> Tensor:
        """[..., A * H] tapped features to the head's input [..., H]."""
        return self.fc(self.input_norm(flat) if self.config.norm_before_fc else flat)


def gather_anchors(states_BTH: Tensor, anchors_BQ: Tensor) -> Tensor:
    """[B, Q, H]: the states at the anchors."""
    return states_BTH.gather(1, anchors_BQ[:, :, None].expand(-1, -1, states_BTH.shape[-1]))


def visible(anchors_BQ: Tensor, starts_BQ: Tensor, keys: slice) -> Tensor:
    """[B, Q, keys]: what an anchor may attend to, from where its row starts up to itself."""
    indices_T = torch.arange(keys.start, keys.stop, device=anchors_BQ.device)
    return (indices_T <= anchors_BQ[:, :, None]) & (indices_T >= starts_BQ[:, :, None])


def layer_config(target_config: Any, architecture: str, num_layers: int, intermediate_size: int | None) -> Any:
    """The target's config, cut down to ``num_layers`` Llama layers: widths, heads and rotary positions stay."""
    config = copy.deepcopy(target_config)
    config.update(
        {
            "architectures": [architecture],
            "num_hidden_layers": num_layers,
            "intermediate_size": intermediate_size or config.intermediate_size,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "target_hidden_size": config.hidden_size,
            "mlp_bias": False,
        }
    )
    return config


def init_layers(head: nn.Module) -> None:
    """Random matrices, and layers that start as their residual."""
    for name, parameter in head.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
