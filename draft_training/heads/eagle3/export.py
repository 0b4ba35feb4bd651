"""The files that vLLM's method ``eagle3`` loads, every flag written: a missing one changes the model silently."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from specdec.record import write_json_atomic

if TYPE_CHECKING:
    from draft_training.heads.eagle3.model import Eagle3Head


def export_head(head: Eagle3Head, directory: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` and ``model.safetensors`` (weights in ``dtype``, ``d2t`` offsets in int64)."""
    directory.mkdir(parents=True, exist_ok=True)
    config = head.config
    rope = config.rope_parameters
    write_json_atomic(
        directory / "config.json",
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "target_hidden_size": config.target_hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": 1,
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
            "vocab_size": config.vocab_size,  # the target's padded one: draft logits are scattered into it
            "draft_vocab_size": head.draft_vocab_size,
            "eagle_aux_hidden_state_layer_ids": head.aux_layer_ids,  # top level: vLLM ignores it elsewhere
            "num_aux_hidden_states": len(head.aux_layer_ids),
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": config.norm_before_fc,
            "fc_norm": False,
            "norm_output": config.norm_output,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "dtype": str(dtype).removeprefix("torch."),
        },
    )
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in head.named_parameters()}
    ids = head.draft_token_ids.cpu()
    tensors["d2t"] = ids - torch.arange(len(ids))  # offsets: target id = i + d2t[i]
    temporary = directory / ".model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
