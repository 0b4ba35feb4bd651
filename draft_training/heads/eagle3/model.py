"""The EAGLE-3 module, numerically what vLLM's Eagle3LlamaForCausalLM computes.

Shapes: B rows, T tokens, H width, A tapped layers, N query heads, M key/value heads, G = N / M, D head width,
V draft vocabulary, K draft tokens. Everything is indexed by *anchor* t: draft position j of anchor t reads token
t + 1 + j, sits at rope position t + j and drafts token t + 2 + j. Indexed so, all positions share one causal mask
and the feedback needs no shift.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from draft_training.features import TargetModel
from draft_training.heads import FeatureBatch, LossOutput
from draft_training.heads.eagle3.config import Eagle3Options
from draft_training.heads.eagle3.export import export_head
from draft_training.heads.eagle3.loss import SoftCrossEntropy


class TestTimeAttention(nn.Module):
    """Attention of training-time test (EAGLE-3 §3.2): true features before the anchor, own drafts after it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, hidden_BTW: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, M, G, T, D], k and v [B, M, T, D], rope applied."""
        B, T, _ = hidden_BTW.shape
        q = self.q_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden_BTW).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q.reshape(B, self.num_kv_heads, self.num_groups, T, self.head_dim), k, v

    def forward(self, q_BMGTD: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attend to ``keys[0]`` causally and to ``keys[1:]`` (own drafts) at the anchor alone. Returns [B, T, H]."""
        B, M, G, T, D = q_BMGTD.shape
        q_BMGTD = q_BMGTD * D**-0.5
        context = (q_BMGTD.reshape(B, M, G * T, D) @ keys[0].transpose(-1, -2)).view(B, M, G, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=context.device).triu(1)
        context = context.masked_fill(future, torch.finfo(context.dtype).min)
        own = [(q_BMGTD * key[:, :, None]).sum(-1, keepdim=True) for key in keys[1:]]
        probs = torch.cat([context, *own], dim=-1).float().softmax(-1).to(q_BMGTD.dtype)
        mixed = (probs[..., :T].reshape(B, M, G * T, T) @ values[0]).view(B, M, G, T, D)
        for j, value in enumerate(values[1:]):
            mixed = mixed + probs[..., T + j : T + j + 1] * value[:, :, None]
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).reshape(B, T, M * G * D))


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

    def forward(
        self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """One draft position for all anchors, [B, T, H]; appends its key and value to the lists."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        q, k, v = self.self_attn.project(torch.cat([self.input_layernorm(embeds), normed], dim=-1), cos, sin)
        keys.append(k)
        values.append(v)
        residual = residual + self.self_attn(q, keys, values)
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
        self.rotary = LlamaRotaryEmbedding(config)
        # Not the head's own: kept out of parameters() and of the exported file.
        self.register_buffer("draft_token_ids", draft_token_ids, persistent=False)
        self.register_buffer("embed_VH", target.embedding.detach().float(), persistent=False)
        teacher = target.lm_head_weight.detach()[draft_token_ids].float()
        self.register_buffer("teacher_VH", teacher, persistent=False)
        to_draft = torch.full((config.vocab_size,), -1, dtype=torch.long)
        to_draft[draft_token_ids] = torch.arange(self.draft_vocab_size)
        self.register_buffer("draft_id_of_target", to_draft, persistent=False)

    def _positions(self, batch_size: int, length: int, offset: int, like: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(offset, offset + length, device=like.device)[None].expand(batch_size, -1)
        return self.rotary(like, positions)

    def fuse(self, aux_hidden: Tensor) -> Tensor:
        """[..., A, H] tapped features to the head's input [..., H]."""
        flat = aux_hidden.flatten(-2)
        return self.fc(self.input_norm(flat) if self.config.norm_before_fc else flat)

    def _unroll(self, batch: FeatureBatch):
        """Yield the normed output [B, T, H] of each draft position, teacher-forced on the row's tokens."""
        hidden = self.fuse(batch.aux_hidden_BTAH)
        B, T, _ = hidden.shape
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for j in range(self.num_speculative_tokens):
            tokens_BT = F.pad(batch.input_ids_BT[:, 1 + j :], (0, min(1 + j, T)))
            embeds = F.embedding(tokens_BT, self.embed_VH)
            cos, sin = self._positions(B, T, j, hidden)
            prenorm = self.layers[0](embeds, hidden, cos, sin, keys, values)
            normed = self.norm(prenorm)
            yield normed
            hidden = normed if self.config.norm_output else prenorm

    def compute_loss(self, batch: FeatureBatch, step_decay: float) -> LossOutput:
        """Mean soft cross-entropy of each draft position, position j weighted ``step_decay ** j``."""
        T = batch.input_ids_BT.shape[1]
        # A position s is worth learning when token s + 1 belongs to the completion and the head can say it.
        learnable_BT = F.pad(batch.loss_mask_BT[:, 1:], (0, 1)) & (self.draft_id_of_target[batch.argmax_BT] >= 0)
        rank_BT = learnable_BT.flatten().cumsum(0).view_as(batch.input_ids_BT) - 1
        teacher_logits = batch.final_hidden_BTH[learnable_BT].float() @ self.teacher_VH.T
        probs_PV = teacher_logits.sub_(batch.logsumexp_BT[learnable_BT][:, None]).exp_()
        # Anchors start where the server's do: the last prompt token, whose successor is the first sampled one.
        anchors_BT = F.pad(batch.loss_mask_BT[:, 1:], (0, 1))
        loss = batch.final_hidden_BTH.new_zeros(())
        num_targets, num_correct = [], []
        for j, normed_BTH in enumerate(self._unroll(batch)):
            shift = 1 + j
            reached_BT = anchors_BT & F.pad(learnable_BT[:, shift:], (0, min(shift, T)))
            rows_P = F.pad(rank_BT[:, shift:], (0, min(shift, T)))[reached_BT]
            probs = probs_PV[rows_P]
            weights = probs.new_full((len(rows_P),), step_decay**j / max(len(rows_P), 1))
            step_loss, best = SoftCrossEntropy.apply(normed_BTH[reached_BT], self.lm_head.weight, probs, weights)
            loss = loss + step_loss
            wanted = F.pad(batch.argmax_BT[:, shift:], (0, min(shift, T)))[reached_BT]
            num_targets.append(len(rows_P))
            num_correct.append(int((self.draft_token_ids[best] == wanted).sum()))
        return LossOutput(loss=loss, num_targets=num_targets, num_correct=num_correct)

    @torch.no_grad()
    def draft_along(self, batch: FeatureBatch) -> Tensor:
        """See ``DraftHead.draft_along``."""
        drafts = [self.draft_token_ids[self.lm_head(normed).argmax(-1)] for normed in self._unroll(batch)]
        return torch.stack(drafts, dim=-1)

    @torch.no_grad()
    def propose(self, aux_hidden_TAH: Tensor, input_ids: Tensor) -> list[int]:
        """See ``DraftHead.propose``: plain autoregression with the layer's keys of the true prefix kept."""
        layer = self.layers[0]
        hidden = self.fuse(aux_hidden_TAH)[None]
        T = hidden.shape[1]
        tokens = input_ids[None, 1:]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        cos, sin = self._positions(1, T, 0, hidden)
        prenorm = layer(F.embedding(tokens, self.embed_VH), hidden, cos, sin, keys, values)[:, -1:]
        drafts: list[int] = []
        for j in range(1, self.num_speculative_tokens + 1):
            normed = self.norm(prenorm)
            drafts.append(int(self.draft_token_ids[self.lm_head(normed)[0, 0].argmax()]))
            if j == self.num_speculative_tokens:
                break
            hidden = normed if self.config.norm_output else prenorm
            cos, sin = self._positions(1, 1, T - 1 + j, hidden)
            token = torch.tensor([[drafts[-1]]], device=hidden.device)
            prenorm = self._extend(F.embedding(token, self.embed_VH), hidden, cos, sin, keys, values)
        return drafts

    def _extend(self, embeds: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, keys: list, values: list) -> Tensor:
        """One more token after the cached ones, [1, 1, H]: ordinary incremental attention."""
        layer = self.layers[0]
        normed = layer.hidden_norm(hidden)
        q, k, v = layer.self_attn.project(torch.cat([layer.input_layernorm(embeds), normed], dim=-1), cos, sin)
        keys[:], values[:] = [torch.cat([*keys, k], dim=2)], [torch.cat([*values, v], dim=2)]
        M, G, D = q.shape[1], q.shape[2], q.shape[-1]
        scores = (q.reshape(1, M, G, D) @ keys[0].transpose(-1, -2)) * D**-0.5
        mixed = (scores.softmax(-1) @ values[0]).reshape(1, 1, M * G * D)
        residual = (normed if layer.norm_before_residual else hidden) + layer.self_attn.o_proj(mixed)
        return residual + layer.mlp(layer.post_attention_layernorm(residual))

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
