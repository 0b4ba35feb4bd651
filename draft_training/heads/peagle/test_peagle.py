"""The anchor-indexed masks against one plain causal forward of each anchor's own sequence, as the server runs it."""

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


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    directory = save_tiny_target(tmp_path_factory.mktemp("target"))
    device = Device(kind="cpu", core_ids=(0,), native_bf16=False)
    return TargetModel.load(resolve_target(TargetConfig(name=str(directory))), "float32", device)


def make_head(target, **options):
    spec = load_head("peagle")
    torch.manual_seed(2)
    head = spec.build(target, torch.arange(200), spec.options_cls(draft_vocab_size=200, **options), K)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def norm(states, weight, config):
    return F.rms_norm(states, states.shape[-1:], weight, eps=config["rms_norm_eps"])


def causal_layer(tensors, config, rotary, reading, residual, index):
    """A decoder layer over a whole sequence [T, W], plainly; returns the residual stream [T, H]."""
    weight = {name.removeprefix(f"layers.{index}."): tensor for name, tensor in tensors.items()}
    cos, sin = (part[0] for part in rotary(reading, torch.arange(len(reading))[None]))
    half, width = config["head_dim"] // 2, config["head_dim"]

    def heads(name, rope):
        states = (reading @ weight[f"self_attn.{name}_proj.weight"].T).view(len(reading), -1, width).transpose(0, 1)
        rotated = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
        return states * cos + rotated * sin if rope else states

    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    q, k, v = heads("q", True), heads("k", True), heads("v", False)
    mixed = F.scaled_dot_product_attention(
        q, k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0), is_causal=True
    )
    residual = residual + mixed.transpose(0, 1).flatten(1) @ weight["self_attn.o_proj.weight"].T
    normed = norm(residual, weight["post_attention_layernorm.weight"], config)
    gated = F.silu(normed @ weight["mlp.gate_proj.weight"].T) * (normed @ weight["mlp.up_proj.weight"].T)
    return residual + gated @ weight["mlp.down_proj.weight"].T


def one_forward(tensors, config, rotary, embedding, ids, aux, anchor):
    """[K, H]: what vLLM's parallel drafting computes behind anchor t, from the exported file."""
    tokens = torch.cat([ids[1 : anchor + 2], torch.full((K - 1,), config["ptd_token_id"])])
    flat = torch.cat([aux[: anchor + 1].flatten(1), tensors["mask_hidden"].view(1, -1).expand(K - 1, -1)])
    if config["norm_before_fc"]:
        flat = norm(flat, tensors["input_norm.weight"], config)
    hidden = flat @ tensors["fc.weight"].T
    normed = norm(hidden, tensors["layers.0.hidden_norm.weight"], config)
    states = normed if config["norm_before_residual"] else hidden
    reading = torch.cat([norm(embedding[tokens], tensors["layers.0.input_layernorm.weight"], config), normed], dim=-1)
    for index in range(config["num_hidden_layers"]):
        if index:
            reading = norm(states, tensors[f"layers.{index}.input_layernorm.weight"], config)
        states = causal_layer(tensors, config, rotary, reading, states, index)
    return norm(states[-K:], tensors["norm.weight"], config)


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 1}, {"num_layers": 3, "norm_before_residual": False, "norm_before_fc": False}]
)
@torch.no_grad()
def test_masks_of_all_anchors_equal_one_forward_each_from_the_exported_file(target, tmp_path, options):
    head = make_head(target, mask_token_id=77, **options)
    head.export(tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ptd_token_id"] == 77
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="7*6?", reasoning="six sevens", response="42"))
    batch = FeatureStore(target, [row], head.aux_layer_ids, 2**30).batch([0])
    outputs = torch.stack([states for states, _ in head.outputs(batch)])[:, 0]
    rotary = head.layers[0].self_attn.rotary
    for q, anchor in enumerate(batch.anchors_BQ[0].tolist()):
        features = batch.aux_hidden_BTAH[0]
        wanted = one_forward(tensors, config, rotary, target.embedding, batch.input_ids_BT[0], features, anchor)
        torch.testing.assert_close(outputs[:, q], wanted, rtol=1e-4, atol=1e-4)


def test_the_mask_token_is_the_end_of_sequence_unless_given(target, tmp_path):
    make_head(target).export(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["ptd_token_id"] == target.config.eos_token_id
    with pytest.raises(ValueError, match="mask_token_id is 99999"):
        make_head(target, mask_token_id=99999)


def test_vllm_is_asked_for_parallel_drafting():
    assert load_head("peagle").vllm_speculative == {"parallel_drafting": True}
