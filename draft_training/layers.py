"""Decoder layers of heads that attend, numerically vLLM's, computed for many anchors at once.

Shapes: B rows, T tokens, Q anchors, H width, W attention input, N query heads, M key/value heads, D head width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

MAX_SCORES = 2**27  # of one attention at once: with a softmax beside them a gigabyte in float32


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

    def forward(
        self, q_BNQD: Tensor, prefix: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]], bias_BQT: Tensor
    ) -> Tensor:
        """Attend to the row's ``prefix`` under ``bias``, and to this anchor's ``own`` keys alone. Returns [B, Q, H].

        More than ``MAX_SCORES`` are made in chunks of anchors, and made again for the gradient.
        """
        B, N, Q, _ = q_BNQD.shape
        size = max(1, MAX_SCORES // (B * N * (prefix[0].shape[2] + len(own))))
        if size >= Q:
            return self.o_proj(self._mix(q_BNQD, prefix, own, bias_BQT))
        chunks = []
        for start in range(0, Q, size):
            part = slice(start, start + size)
            own_part = [(key[:, :, part], value[:, :, part]) for key, value in own]
            arguments = q_BNQD[:, :, part], prefix, own_part, bias_BQT[:, part]
            chunks.append(checkpoint(self._mix, *arguments, use_reentrant=False, preserve_rng_state=False))
        return self.o_proj(torch.cat(chunks, dim=1))

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
            indices_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
            mask = visible(indices_T.expand_as(starts_BT), starts_BT)[:, None]
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


def visible(anchors_BQ: Tensor, starts_BT: Tensor) -> Tensor:
    """[B, Q, T]: what an anchor may attend to, from where its row starts up to itself."""
    indices_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    starts_BQ = starts_BT.gather(1, anchors_BQ)
    return (indices_T <= anchors_BQ[:, :, None]) & (indices_T >= starts_BQ[:, :, None])


def attention_bias(anchors_BQ: Tensor, starts_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Q, T]: 0 where an anchor may attend to, and as good as minus infinity elsewhere."""
    hidden = ~visible(anchors_BQ, starts_BT)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)


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
