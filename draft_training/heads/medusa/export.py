"""The files that vLLM's method ``medusa`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from draft_training.export import parameters_in, write_head

if TYPE_CHECKING:
    from draft_training.heads.medusa.model import MedusaHead


def export_head(head: MedusaHead, directory: Path, dtype: torch.dtype) -> None:
    """Weights in ``dtype``; a frozen output layer as exact as the target's own; ``token_map`` holds target ids."""
    tensors = parameters_in(head, dtype)
    if head.options.lm_head == "target":
        rows = head.teacher_VH.cpu()
        rounded = rows.to(dtype)
        tensors["lm_head.weight"] = rounded if torch.equal(rounded.float(), rows) else rows
    truncated = head.draft_vocab_size < head.vocab_size
    if truncated:
        tensors["token_map"] = head.draft_token_ids.cpu()  # ids, not offsets as in EAGLE-3
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": head.hidden_size,
        "num_hidden_layers": head.options.num_layers,  # of a head
        # vLLM renames every key with "num" and "heads" in it to this one: no other may be written.
        "num_heads": head.num_speculative_tokens,
        "medusa_fc_bias": head.options.fc_bias,  # unset, vLLM drops the biases
        "original_lm_head": head.options.lm_head != "own",  # one output layer for all heads, from this file
        "vocab_size": head.vocab_size,  # the target's padded one: vLLM forgets the truncation when they differ
        "truncated_vocab_size": head.draft_vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_head(directory, config, tensors)
