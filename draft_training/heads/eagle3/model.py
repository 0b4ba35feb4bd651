"""The EAGLE-3 module, numerically what vLLM's Eagle3LlamaForCausalLM computes.

Shapes: B rows, T tokens, Q anchors, H width, W = 2H, A tapped layers, N query heads, M key/value heads, D head width,
V draft vocabulary, P learnable positions. Everything is indexed by *anchor* t: draft position j of anchor t reads
token t + 1 + j, sits at rope position t + j and drafts token t + 2 + j. Indexed so, all draft positions share one
causal mask and the feedback needs no shift.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half

from draft_training.features import TargetModel
from draft_training.heads import FeatureBatch, LossOutput
from draft_training.heads.eagle3.config import Eagle3Options
from draft_training.heads.eagle3.export import export_head
from draft_training.heads.eagle3.loss import SoftCrossEntropy


class TestTimeAttention(nn.Module):
    """Attention of training-time test (EAGLE-3 §3.2): true features up to the anchor, own drafts after it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        width = 2 * config.hidden_size
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
        """Attend to the row's ``prefix`` under ``bias``, and to this anchor's ``own`` keys alone. Returns [B, Q, H]."""
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
        return self.o_proj(mixed.view(B, N, Q, D).transpose(1, 2).flatten(2))


class Eagle3Layer(nn.Module):
    """The one decoder layer; tensor names are vLLM's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = TestTimeAttention(config)
        self.mlp = LlamaMLP(config)

    def inputs(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Attention input [..., 2H] and the residual stream [..., H]."""
        normed = self.hidden_norm(hidden)
        return torch.cat(
            [self.input_layernorm(embeds), normed], dim=-1
        ), normed if self.norm_before_residual else hidden

    def outputs(self, attended: Tensor, residual: Tensor) -> Tensor:
        """What follows attention: the residual stream after the layer."""
        residual = residual + attended
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3Head(nn.Module):
    """fc over the tapped features, one layer, a draft-vocabulary lm_head; embeddings are the target's, frozen."""

    def __init__(self, config: Any, target: TargetModel, draft_token_ids: Tensor, num_speculative_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.aux_layer_ids = list(config.eagle_aux_hidden_state_layer_ids)
        self.num_speculative_tokens = num_speculative_tokens
        self.draft_vocab_size = len(draft_token_ids)
        width = config.target_hidden_size * len(self.aux_layer_ids)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, self.draft_vocab_size, bias=False)
        # Not the head's own: kept out of parameters() and of the exported file.
        self.register_buffer("draft_token_ids", draft_token_ids, persistent=False)
        self.register_buffer("embed_VH", target.embedding.detach().float(), persistent=False)
        teacher = target.lm_head_weight.detach()[draft_token_ids].float()
        self.register_buffer("teacher_VH", teacher, persistent=False)
        to_draft = torch.full((config.vocab_size,), -1, dtype=torch.long)
        to_draft[draft_token_ids] = torch.arange(self.draft_vocab_size)
        self.register_buffer("draft_id_of_target", to_draft, persistent=False)

    def fuse(self, aux_hidden: Tensor) -> Tensor:
        """[..., A, H] tapped features to the head's input [..., H]."""
        flat = aux_hidden.flatten(-2)
        return self.fc(self.input_norm(flat) if self.config.norm_before_fc else flat)

    def _unroll(self, input_ids_BT: Tensor, aux_hidden_BTAH: Tensor, anchors_BQ: Tensor, own_drafts: bool = False):
        """Yield the normed output [B, Q, H] of each draft position at the anchors.

        Position j reads the row's own token t + 1 + j (past the end: the last one), or with ``own_drafts`` what this
        head drafted before. Only keys and values are computed where there is no anchor.
        """
        layer = self.layers[0]
        T = aux_hidden_BTAH.shape[1]
        last = input_ids_BT.shape[1] - 1
        positions_BT = torch.arange(T, device=anchors_BQ.device)[None].expand(len(anchors_BQ), -1)
        next_ids = input_ids_BT[:, (torch.arange(T, device=anchors_BQ.device) + 1).clamp(max=last)]
        everywhere, residual = layer.inputs(F.embedding(next_ids, self.embed_VH), self.fuse(aux_hidden_BTAH))
        prefix = layer.self_attn.key_value(everywhere, positions_BT)
        bias = torch.zeros_like(anchors_BQ, dtype=residual.dtype)[:, :, None].expand(-1, -1, T).clone()
        bias.masked_fill_(positions_BT[:, None] > anchors_BQ[:, :, None], torch.finfo(bias.dtype).min)
        inputs, residual = _gather(everywhere, anchors_BQ), _gather(residual, anchors_BQ)
        own: list[tuple[Tensor, Tensor]] = []
        hidden = drafted = torch.empty(0)  # set by the first pass
        for j in range(self.num_speculative_tokens):
            if j:
                tokens_BQ = drafted if own_drafts else input_ids_BT.gather(1, (anchors_BQ + 1 + j).clamp(max=last))
                inputs, residual = layer.inputs(F.embedding(tokens_BQ, self.embed_VH), hidden)
                own.append(layer.self_attn.key_value(inputs, anchors_BQ + j))
            attended = layer.self_attn(layer.self_attn.query(inputs, anchors_BQ + j), prefix, own, bias)
            prenorm = layer.outputs(attended, residual)
            normed = self.norm(prenorm)
            yield normed
            hidden = normed if self.config.norm_output else prenorm
            if own_drafts:
                drafted = self._greedy(normed)

    def _greedy(self, normed: Tensor) -> Tensor:
        return self.draft_token_ids[self.lm_head(normed).argmax(-1)]

    def compute_loss(self, batch: FeatureBatch, step_decay: float) -> LossOutput:
        """Mean soft cross-entropy of each draft position, position j weighted ``step_decay ** j``."""
        # A position s is worth learning when token s + 1 belongs to the completion and the head can say it.
        learnable_BT = F.pad(batch.loss_mask_BT[:, 1:], (0, 1)) & (self.draft_id_of_target[batch.argmax_BT] >= 0)
        rank_BT = learnable_BT.flatten().cumsum(0).view_as(learnable_BT) - 1
        teacher_logits = batch.final_hidden_BTH[learnable_BT] @ self.teacher_VH.T
        probs_PV = teacher_logits.float().sub_(batch.logsumexp_BT[learnable_BT][:, None]).exp_()
        last = batch.input_ids_BT.shape[1] - 1
        loss = batch.final_hidden_BTH.new_zeros(())
        num_targets, num_correct = [], []
        for j, normed_BQH in enumerate(self._unroll(batch.input_ids_BT, batch.aux_hidden_BTAH, batch.anchors_BQ)):
            seen_BQ = (batch.anchors_BQ + 1 + j).clamp(max=last)  # the target's token after it is the label
            reached_BQ = batch.anchor_mask_BQ & (batch.anchors_BQ + 1 + j <= last) & learnable_BT.gather(1, seen_BQ)
            probs = probs_PV[rank_BT.gather(1, seen_BQ)[reached_BQ]]
            weights = probs.new_full((len(probs),), step_decay**j / max(len(probs), 1))
            step_loss, best = SoftCrossEntropy.apply(normed_BQH[reached_BQ], self.lm_head.weight, probs, weights)
            loss = loss + step_loss
            wanted = batch.argmax_BT.gather(1, seen_BQ)[reached_BQ]
            num_targets.append(len(probs))
            num_correct.append(int((self.draft_token_ids[best] == wanted).sum()))
        return LossOutput(loss=loss, num_targets=num_targets, num_correct=num_correct)

    @torch.no_grad()
    def draft_along(self, batch: FeatureBatch) -> Tensor:
        """See ``DraftHead.draft_along``."""
        unrolled = self._unroll(batch.input_ids_BT, batch.aux_hidden_BTAH, batch.anchors_BQ)
        return torch.stack([self._greedy(normed) for normed in unrolled], dim=-1)

    @torch.no_grad()
    def propose(self, aux_hidden_TAH: Tensor, input_ids: Tensor) -> list[int]:
        """See ``DraftHead.propose``."""
        anchor = torch.tensor([[len(aux_hidden_TAH) - 1]], device=aux_hidden_TAH.device)
        unrolled = self._unroll(input_ids[None], aux_hidden_TAH[None], anchor, own_drafts=True)
        return [int(self._greedy(normed)) for normed in unrolled]

    def parameter_groups(self, learning_rate: float, lm_head_lr_scale: float, weight_decay: float) -> list[dict]:
        """Matrices decay, norms don't; the lm_head starts from the target's rows and may want smaller steps."""
        matrices = [p for name, p in self.named_parameters() if p.ndim == 2 and not name.startswith("lm_head")]
        norms = [p for p in self.parameters() if p.ndim == 1]
        return [
            {"params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"params": norms, "lr": learning_rate, "weight_decay": 0.0},
            {"params": [self.lm_head.weight], "lr": learning_rate * lm_head_lr_scale, "weight_decay": 0.0},
        ]

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """See ``DraftHead.export``."""
        export_head(self, directory, dtype)


def _gather(states_BTH: Tensor, anchors_BQ: Tensor) -> Tensor:
    return states_BTH.gather(1, anchors_BQ[:, :, None].expand(-1, -1, states_BTH.shape[-1]))


def build(
    target: TargetModel, draft_token_ids: Tensor, options: Eagle3Options, num_speculative_tokens: int
) -> Eagle3Head:
    """A head with random layers and the target's own rows as lm_head and final norm."""
    config = copy.deepcopy(target.config)
    config.update(
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "intermediate_size": options.intermediate_size or config.intermediate_size,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "target_hidden_size": config.hidden_size,
            "draft_vocab_size": len(draft_token_ids),
            "eagle_aux_hidden_state_layer_ids": options.resolve_aux_layer_ids(target.config.num_hidden_layers),
            "norm_before_residual": options.norm_before_residual,
            "norm_before_fc": options.norm_before_fc,
            "norm_output": options.norm_output,
            "mlp_bias": False,
        }
    )
    head = Eagle3Head(config, target, draft_token_ids, num_speculative_tokens)
    for name, parameter in head.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)  # the layer starts as its residual
    with torch.no_grad():
        head.lm_head.weight.copy_(head.teacher_VH)
        head.norm.weight.copy_(target.final_norm_weight)
    return head
