"""Medusa's modes, its offsets, and the files that vLLM reads."""

from __future__ import annotations

import json
from collections import Counter

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

K = 3
IDS = torch.tensor([1, 5, 6, 50, 200, 250])


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    directory = save_tiny_target(tmp_path_factory.mktemp("target"), "qwen2")
    device = Device(kind="cpu", core_ids=(0,), native_bf16=False)
    return TargetModel.load(resolve_target(TargetConfig(name=str(directory))), "float32", device)


def make_head(target, shake=True, **options):
    spec = load_head("medusa")
    opts = spec.options_cls(**{"draft_vocab_size": len(IDS), **options})
    whole = spec.draft_vocab_size(opts, target.config.vocab_size, Counter()) != len(IDS)
    torch.manual_seed(3)
    head = spec.build(target, torch.arange(target.config.vocab_size) if whole else IDS, opts, K)
    with torch.no_grad():
        for parameter in head.parameters() if shake else []:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


def logits_from_file(tensors, config, hidden) -> torch.Tensor:
    """[K, V]: what vLLM's Medusa computes from the exported files for one hidden state, in target ids."""
    rows = []
    for i in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{i}.layers.{layer}"
            bias = tensors[f"{name}.bias"] if config["medusa_fc_bias"] else None
            x = x + F.silu(F.linear(x, tensors[f"{name}.weight"], bias))
        matrix = tensors["lm_head.weight" if config["original_lm_head"] else f"lm_heads.{i}.weight"]
        logits = matrix @ x
        if config["truncated_vocab_size"] < config["vocab_size"]:
            scattered = torch.full((config["vocab_size"],), -torch.inf)
            scattered[tensors["token_map"]] = logits
            logits = scattered
        rows.append(logits)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, {"fc_bias": False, "num_layers": 2}, {"lm_head": "target"}, {"lm_head": "own"}]
)
def test_the_exported_files_draft_what_the_head_drafts(target, tmp_path, options):
    head = make_head(target, **options)
    head.export(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="7*6?", reasoning="six sevens", response="42"))
    batch = FeatureStore(target, [row], [], 2**30).batch([0])
    drafts = head.draft_along(batch)[0]
    assert len({tuple(draft) for draft in drafts.tolist()}) > 1
    for q, anchor in enumerate(batch.anchors_BQ[0].tolist()):
        wanted = logits_from_file(tensors, config, batch.final_hidden_BTH[0, anchor]).argmax(-1)
        assert drafts[q].tolist() == wanted.tolist()


def test_an_untrained_head_repeats_the_target_s_own_next_token(target):
    head = make_head(target, shake=False, lm_head="own")
    row = tokenize_trace(tiny_tokenizer(), ReasoningTrace(prompt="1+1?", reasoning="two", response="2"))
    batch = FeatureStore(target, [row], [], 2**30).batch([0])
    own_choice = batch.argmax_BT.gather(1, batch.anchors_BQ)  # token t + 1, from the hidden state at t
    assert torch.equal(head.draft_along(batch), own_choice[:, :, None].expand(-1, -1, K))


def test_no_key_of_the_config_is_taken_for_another(target, tmp_path):
    make_head(target).export(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    renamed = [key for key in config if "num" in key and ("heads" in key or "layers" in key)]
    assert sorted(renamed) == ["num_heads", "num_hidden_layers"]


def test_a_frozen_output_layer_is_exported_as_exactly_as_the_target_has_it(target, tmp_path):
    make_head(target, lm_head="target").export(tmp_path, torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], target.lm_head_weight[IDS])


def test_an_unknown_output_layer_is_refused():
    spec = load_head("medusa")
    with pytest.raises(ValueError, match="shared, target, own"):
        spec.draft_vocab_size(spec.options_cls(lm_head="tied"), 100, Counter())
