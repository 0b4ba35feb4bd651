"""A head's files, ``config.json`` and ``model.safetensors``, every flag written: a missing one changes it silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.record import write_json_atomic


def llama_config(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What vLLM reads of a head made of Llama layers, its own flags aside."""
    rope = config.rope_parameters
    return {
        "architectures": config.architectures,
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,  # the target's padded one
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def eagle3_config(config: Any, dtype: torch.dtype, draft_vocab_size: int) -> dict[str, Any]:
    """The config of vLLM's ``LlamaForCausalLMEagle3``."""
    return {
        **llama_config(config, dtype),
        "target_hidden_size": config.target_hidden_size,
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,  # vLLM looks at the top level
        "num_aux_hidden_states": len(config.eagle_aux_hidden_state_layer_ids),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": False,
        "norm_output": config.norm_output,
    }


def draft_map(draft_token_ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """``d2t``: target id = i + d2t[i]. A head that drafts every token has none, and vLLM refuses one."""
    if len(draft_token_ids) == vocab_size:
        return {}
    ids = draft_token_ids.cpu()
    return {"d2t": ids - torch.arange(len(ids))}


def parameters_in(head: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The head's parameters on the CPU."""
    return {name: p.detach().to("cpu", dtype).contiguous() for name, p in head.named_parameters()}


def write_head(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(directory / "config.json", config)
    temporary = directory / ".model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
