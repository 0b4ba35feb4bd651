"""A target and clean EAGLE-3 heads for it as files, of zeros: for what reads files and loads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from specdec.config import TargetConfig
from specdec.manifest import HeadManifest
from specdec.targets import Target, resolve_target

HIDDEN, VOCAB, K = 8, 32, 3


def write_target(directory: Path, fill: float = 0.0) -> Target:
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 6,
        "num_attention_heads": 1, "max_position_embeddings": 512, "rope_theta": 10000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"w": np.full(4, fill, np.float32)}, directory / "model.safetensors")
    return resolve_target(TargetConfig(name=str(directory)))


def write_head(
    directory: Path, target: Target, draft_vocab: int = 16, config: dict[str, Any] | None = None, **says: Any
) -> Path:
    """An EAGLE-3 head that nothing is wrong with; ``says``: other words of its manifest."""
    directory.mkdir(exist_ok=True)
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"], "hidden_size": HIDDEN, "vocab_size": VOCAB, "rope_theta": 10000.0,
        "draft_vocab_size": draft_vocab, "eagle_aux_hidden_state_layer_ids": [2, 3, 4], "norm_before_residual": False,
        **(config or {}),
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings))
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors = {f"layers.0.{name}.weight": np.zeros((HIDDEN, HIDDEN), np.float32) for name in (*names, *norms)}
    tensors |= {
        "fc.weight": np.zeros((HIDDEN, 3 * HIDDEN), np.float32),
        "norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": np.zeros((draft_vocab, HIDDEN), np.float32),
        "d2t": np.zeros(draft_vocab, np.int64),
    }
    save_file(tensors, directory / "model.safetensors")
    facts = {
        "head": "eagle3", "vllm_method": "eagle3", "num_speculative_tokens": K, "target_name": "t",
        "draft_vocab_size": draft_vocab, "target": target.fingerprint(),
    }  # fmt: skip
    HeadManifest(**facts | says).save(directory)
    return directory
