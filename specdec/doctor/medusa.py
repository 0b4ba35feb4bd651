"""Medusa heads as vLLM 0.32 reads them (``medusa.py``, ``transformers_utils/configs/medusa.py``)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from specdec.doctor.files import HeadFiles
from specdec.doctor.findings import Finding


def check_medusa(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    """K residual heads over the target's last hidden state."""
    names = [name.removeprefix("medusa_heads.") for name in head.tensors]
    renamed = [
        key for key in head.config if "num" in key and "heads" in key and key not in ("num_heads", "medusa_num_heads")
    ]
    if renamed:
        what = f"config.json has {renamed[0]}, which vLLM takes for num_heads"
        yield Finding(
            code="medusa-key", what=what, fix=f"remove {', '.join(renamed)}; num_heads is the number of heads"
        )
    if any(name.endswith(".bias") for name in names) and not head.config.get("medusa_fc_bias"):
        what = "the heads have biases, which vLLM drops because medusa_fc_bias is not set"
        yield Finding(code="bias-dropped", what=what, fix='write "medusa_fc_bias": true')
    num_heads = head.config.get("num_heads", head.config.get("medusa_num_heads"))
    found = {int(match[1]) for name in names if (match := re.match(r"(?:blocks\.)?(\d+)\.", name))}
    if num_heads is None:
        yield Finding(code="medusa-heads", what="num_heads is not written", fix=f'write "num_heads": {len(found)}')
    elif len(found) < int(num_heads):
        what = f"num_heads is {num_heads}, the file holds {len(found)}: the others stay uninitialised"
        yield Finding(code="medusa-heads", what=what, fix=f'write "num_heads": {len(found)}, or export them all')
    own = any(re.match(r"lm_heads\.\d+\.weight|\d+\.\d+\.weight", name) for name in names)
    shared = "lm_head.weight" in names
    if not own and not shared:
        what = "neither lm_heads.N.weight nor lm_head.weight is in the file: the output layer stays uninitialised"
        yield Finding(code="lm-head-missing", what=what, fix="export lm_heads, or one lm_head with original_lm_head")
    if shared and not own and not head.config.get("original_lm_head"):
        what = "one lm_head.weight is in the file, but original_lm_head is not set"
        yield Finding(code="lm-head-missing", what=what, fix='write "original_lm_head": true')
    truncated = head.config.get("truncated_vocab_size")
    if truncated not in (None, head.config.get("vocab_size")) and not head.config.get("original_lm_head"):
        what = f"truncated_vocab_size is {truncated}, which works with original_lm_head alone"
        yield Finding(code="medusa-truncated", what=what, fix='write "original_lm_head": true and export a token_map')
    yield from _token_map(head)
    hidden = head.config.get("hidden_size")
    if hidden is not None and int(hidden) != int(target["hidden_size"]):
        what = f"the heads take hidden states of {hidden}, the target has {target['hidden_size']}"
        yield Finding(code="hidden-size", what=what, fix="serve them with the target that they were trained for")
    size = head.config.get("vocab_size")
    if size is not None and int(size) != int(target["vocab_size"]):
        what = f"vocab_size is {size}, the target's (padded) one {target['vocab_size']}"
        yield Finding(code="vocab-size", what=what, fix="write the target's vocab_size")


def _token_map(head: HeadFiles) -> Iterator[Finding]:
    """vLLM scatters logits to the ids of the map as they are: one outside the vocabulary ends the engine."""
    name = next((name for name in ("token_map", "medusa_heads.token_map") if name in head.tensors), None)
    size, vocab_size = head.config.get("truncated_vocab_size"), head.config.get("vocab_size")
    if name is None or vocab_size is None or size in (None, vocab_size):  # vLLM leaves it out
        return
    ids = head.integers(name) or []
    if len(ids) == len(set(ids)) == int(size) and 0 <= min(ids) <= max(ids) < int(vocab_size):
        return
    what = f"token_map does not hold {size} different ids of the target's vocabulary"
    yield Finding(code="token-map", what=what, fix="export the target id of each draft token, int64")
