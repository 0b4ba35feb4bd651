"""The unrolled EAGLE-1 layer against the same layer run one token at a time from the exported file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from draft_training.features import FeatureStore
from draft_training.heads import load_head
from draft_training.recipe import Objective
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import ReasoningTrace, tokenize_trace
from tests.tiny import save_tiny_target, tiny_tokenizer

K = 4
FILE_TENSORS = {
    "fc.weight", "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    directory = save_tiny_target(tmp_path_factory.mktemp("target"))
    device = Device(kind="cpu", core_ids=(0,), native_bf16=False)
    return TargetModel.load(resolve_target(TargetConfig(name=str(directory))), "float32", device)


@pytest.fixture(scope="module")
def batch(target):
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="7*6?", reasoning="six sevens", response="42"))
    return FeatureStore(target, [row], [], 2**30).batch([0])


def make_head(target, **options):
    spec = load_head("eagle")
    torch.manual_seed(2)
    head = spec.build(target, torch.arange(target.config.vocab_size), spec.options_cls(**options), K)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def one_token(tensors, config, rotary, embed, hidden, position, keys, values):
    """What vLLM's EagleLlamaForCausalLM computes for one token: the residual stream after the layer, [H]."""
    weight = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    residual = weight["fc.weight"] @ torch.cat([embed, hidden])  # no input norm follows
    cos, sin = (part[0, 0] for part in rotary(residual, torch.tensor([[position]])))
    half, width = config["head_dim"] // 2, config["head_dim"]

    def heads(name, rope):
        states = (weight[f"self_attn.{name}_proj.weight"] @ residual).view(-1, width)
        rotated = torch.cat([-states[:, half:], states[:, :half]], dim=-1)
        return states * cos + rotated * sin if rope else states

    q = heads("q", True)
    keys.append(heads("k", True))
    values.append(heads("v", False))
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    all_keys, all_values = (torch.stack(states).repeat_interleave(groups, dim=1) for states in (keys, values))
    probs = (torch.einsum("nd,tnd->nt", q, all_keys) * width**-0.5).softmax(-1)
    residual = residual + weight["self_attn.o_proj.weight"] @ torch.einsum("nt,tnd->nd", probs, all_values).flatten()
    normed = F.rms_norm(residual, residual.shape, weight["post_attention_layernorm.weight"], eps=config["rms_norm_eps"])
    gated = F.silu(weight["mlp.gate_proj.weight"] @ normed) * (weight["mlp.up_proj.weight"] @ normed)
    return residual + weight["mlp.down_proj.weight"] @ gated


@torch.no_grad()
def test_unrolling_equals_decoding_the_exported_file_token_by_token(target, batch, tmp_path):
    head = make_head(target)
    head.export(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(tensors) == FILE_TENSORS
    rotary, ids = head.layers[0].self_attn.rotary, batch.input_ids_BT[0]
    unrolled = torch.stack([states for states, _ in head.outputs(batch)])[:, 0]
    for q, anchor in enumerate(batch.anchors_BQ[0].tolist()):
        keys: list = []
        values: list = []
        for t in range(anchor + 1):
            hidden = batch.final_hidden_BTH[0, t]
            states = one_token(tensors, config, rotary, target.embedding[ids[t + 1]], hidden, t, keys, values)
        torch.testing.assert_close(unrolled[0, q], states, rtol=1e-4, atol=1e-4)
        for j in range(1, min(K, len(ids) - anchor - 1)):
            embed = target.embedding[ids[anchor + 1 + j]]
            states = one_token(tensors, config, rotary, embed, states, anchor + j, keys, values)
            torch.testing.assert_close(unrolled[j, q], states, rtol=1e-4, atol=1e-4)


def test_the_feature_loss_is_the_smooth_l1_distance_of_every_position(target, batch):
    plain, regressing = make_head(target), make_head(target, feature_loss_weight=0.5)
    last = int(batch.ends_BT[0, 0]) - 1
    wanted = 0.0
    for j, (states, _) in enumerate(plain.outputs(batch)):
        pairs = [
            F.smooth_l1_loss(states[0, q], batch.final_hidden_BTH[0, t + 1 + j])
            for q, t in enumerate(batch.anchors_BQ[0].tolist())
            if t + 1 + j <= last
        ]
        wanted = wanted + 0.5 * 0.8**j * torch.stack(pairs).mean()
    falling = Objective(step_decay=0.8)
    difference = regressing.compute_loss(batch, falling).loss - plain.compute_loss(batch, falling).loss
    torch.testing.assert_close(difference, wanted, rtol=1e-4, atol=1e-4)


def test_logits_are_the_target_s_over_its_whole_vocabulary(target, batch):
    _, weight = next(make_head(target).outputs(batch))
    assert torch.equal(weight, target.lm_head_weight) and not weight.requires_grad
