"""The unrolled, anchor-indexed layer against the same layer run one token at a time with a growing cache."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from draft_training.features import FeatureStore
from draft_training.heads import load_head
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import ReasoningTrace, tokenize_trace
from tests.tiny import save_tiny_target, tiny_tokenizer

K = 4


def one_token(head, embed, hidden, position, keys, values):
    """What the server runs for one token: returns the residual stream after the layer, [H]."""
    layer, attention = head.layers[0], head.layers[0].self_attn
    normed = layer.hidden_norm(hidden)
    inputs = torch.cat([layer.input_layernorm(embed), normed])
    cos, sin = (part[0, 0] for part in attention.rotary(inputs, torch.tensor([[position]])))

    def heads(projection, rope):
        states = projection(inputs).view(-1, attention.head_dim)
        half = attention.head_dim // 2
        rotated = torch.cat([-states[:, half:], states[:, :half]], dim=-1)
        return states * cos + rotated * sin if rope else states

    q = heads(attention.q_proj, True)
    keys.append(heads(attention.k_proj, True))
    values.append(heads(attention.v_proj, False))
    all_keys, all_values = (torch.stack(s).repeat_interleave(attention.num_groups, dim=1) for s in (keys, values))
    probs = (torch.einsum("nd,tnd->nt", q, all_keys) * attention.head_dim**-0.5).softmax(-1)
    mixed = attention.o_proj(torch.einsum("nt,tnd->nd", probs, all_values).flatten())
    residual = (normed if layer.norm_before_residual else hidden) + mixed
    return residual + layer.mlp(layer.post_attention_layernorm(residual))


def load_target(directory) -> TargetModel:
    device = Device(kind="cpu", core_ids=(0,), native_bf16=False)
    return TargetModel.load(resolve_target(TargetConfig(name=str(save_tiny_target(directory)))), "float32", device)


@pytest.mark.parametrize("flags", [{}, {"norm_before_residual": False, "norm_before_fc": False, "norm_output": False}])
@torch.no_grad()
def test_unrolling_equals_decoding_token_by_token(tmp_path, flags):
    target = load_target(tmp_path)
    spec = load_head("eagle3")
    torch.manual_seed(2)
    head = spec.build(target, torch.arange(200), spec.options_cls(**flags), K)
    for parameter in head.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="7*6?", reasoning="six sevens", response="42"))
    batch = FeatureStore(target, [row], head.aux_layer_ids, 2**30).batch([0])
    unrolled = torch.stack([states for states, _ in head.outputs(batch)])[:, 0]

    ids, fused = batch.input_ids_BT[0], head.fuse(batch.aux_hidden_BTAH[0].flatten(-2))
    for q, anchor in enumerate(batch.anchors_BQ[0].tolist()):
        keys: list = []
        values: list = []
        for t in range(anchor + 1):
            prenorm = one_token(head, F.embedding(ids[t + 1], head.embed_VH), fused[t], t, keys, values)
        for j in range(K):
            if j:
                if anchor + 1 + j >= len(ids):
                    break
                hidden = head.norm(prenorm) if head.config.norm_output else prenorm
                embed = F.embedding(ids[anchor + 1 + j], head.embed_VH)
                prenorm = one_token(head, embed, hidden, anchor + j, keys, values)
            torch.testing.assert_close(unrolled[j, q], head.norm(prenorm), rtol=1e-4, atol=1e-4)


def test_export_maps_draft_ids_by_offsets_and_writes_every_flag(tmp_path):
    target = load_target(tmp_path / "target")
    spec = load_head("eagle3")
    ids = torch.tensor([3, 4, 9, 200])
    head = spec.build(target, ids, spec.options_cls(draft_vocab_size=4), K)
    head.export(tmp_path, torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["d2t"].tolist() == [3, 3, 7, 197]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["draft_vocab_size"] == 4
    flags = {name: config[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    assert flags == {"norm_before_residual": True, "norm_before_fc": True, "fc_norm": False, "norm_output": True}
    assert config["eagle_aux_hidden_state_layer_ids"] == head.aux_layer_ids
    assert config["num_aux_hidden_states"] == len(head.aux_layer_ids)


def test_a_head_of_the_whole_vocabulary_has_no_map(tmp_path):
    """vLLM makes no map then, and refuses a tensor without a place."""
    target = load_target(tmp_path / "target")
    spec = load_head("eagle3")
    vocab_size = target.config.vocab_size
    spec.build(target, torch.arange(vocab_size), spec.options_cls(), K).export(tmp_path, torch.bfloat16)
    assert "d2t" not in load_file(tmp_path / "model.safetensors")
