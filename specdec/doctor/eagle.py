"""EAGLE-1 and EAGLE-3 heads as vLLM 0.32 reads them (``llama_eagle.py``, ``llama_eagle3.py``, ``speculators/``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specdec.doctor.files import HeadFiles
from specdec.doctor.findings import Finding

NORM_FLAGS = {"norm_before_fc": "input_norm.", "fc_norm": "fc_norm."}  # flag -> tensors that are dropped without it
MIN_TELLING_TOKENS = 256  # of a smaller draft vocabulary it could be chance that no two neighbours are in it
LAYER_PREFIXES = ("layers.0.", "midlayer.")
LAYER_TENSORS = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight",
)  # fmt: skip


def check_eagle1(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    """An EAGLE-1/2 head: one layer over token embedding and the target's normed hidden state."""
    yield from _layer_tensors(head, LAYER_TENSORS)
    hidden = int(target["hidden_size"])
    if head.shape("fc.weight") not in (None, (hidden, 2 * hidden)):
        what = f"fc.weight is {head.shape('fc.weight')}, the target's hidden size asks for {(hidden, 2 * hidden)}"
        yield Finding(code="fc-shape", what=what, fix="train a head for this target")
    for name in ("lm_head.weight", "norm.weight", "layers.0.input_layernorm.weight"):
        if name in head.tensors:
            what = f"{name} is in the file, but vLLM's EAGLE-1 module has no such part"
            yield Finding(code="unexpected-tensor", what=what, fix=f"drop {name}; train without it")


def check_eagle3(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    """An EAGLE-3 head, in the style of Hugging Face configs or of speculators."""
    speculators = "speculators_model_type" in head.config
    yield from _layer_tensors(head, (*LAYER_TENSORS, "input_layernorm.weight", "hidden_norm.weight"))
    layers = yield from _aux_layers(head, target)
    yield from _fc_width(head, target, layers)
    yield from _norms(head, speculators)
    yield from _draft_vocabulary(head, target)
    if "norm.weight" not in head.tensors:
        what = "norm.weight is missing: vLLM does not check, and normalises with uninitialised memory"
        yield Finding(code="norm-missing", what=what, fix="export the final norm")


def check_biases(head: HeadFiles) -> Iterator[Finding]:
    """Biases that no module takes are dropped without a word."""
    if "fc.bias" in head.tensors:
        what = "fc.bias is in the file, but vLLM builds fc without a bias and drops it: acceptance will be lower"
        yield Finding(code="bias-dropped", what=what, fix="train with a bias-free fc")
    biased = [name for name in head.tensors if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))]
    if biased and not _layer_config(head).get("attention_bias"):
        what = f"{biased[0]} is dropped, because attention_bias is not set"
        yield Finding(code="bias-dropped", what=what, fix='write "attention_bias": true into config.json')


def check_rope(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    """Positions must mean in serving what they meant in training: EAGLE heads train on the target's own."""
    ours, theirs = _rope(_layer_config(head)), _rope(target)
    if ours != theirs:
        what = f"the head's rotary positions {ours} are not the target's {theirs}"
        yield Finding(code="rope", what=what, fix="write the parameters that training used, usually the target's own")


def check_vocabulary(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    """Draft logits are scattered into the target's padded vocabulary."""
    size = head.config.get("vocab_size", _layer_config(head).get("vocab_size"))
    if size is not None and int(size) != int(target["vocab_size"]):
        what = f"vocab_size is {size}, the target's (padded) one {target['vocab_size']}"
        yield Finding(code="vocab-size", what=what, fix="write the target's vocab_size; R1-Distill sizes differ in it")
    hidden = head.config.get("target_hidden_size") or _layer_config(head).get("hidden_size")
    if hidden is not None and int(hidden) != int(target["hidden_size"]):
        what = f"the head takes hidden states of {hidden}, the target has {target['hidden_size']}"
        yield Finding(code="hidden-size", what=what, fix="serve it with the target that it was trained for")


def _layer_config(head: HeadFiles) -> dict[str, Any]:
    return head.config.get("transformer_layer_config") or head.config


def _layer_tensors(head: HeadFiles, wanted: tuple[str, ...]) -> Iterator[Finding]:
    for name in ("fc.weight",):
        if name not in head.tensors:
            what = f"{name} is missing" + (" (names start with model.)" if f"model.{name}" in head.tensors else "")
            yield Finding(code="tensor-missing", what=what, fix="export the tensors without the prefix model.")
            return
    for name in wanted:
        if not any(prefix + name in head.tensors for prefix in LAYER_PREFIXES):
            what = f"layers.0.{name} is missing: vLLM leaves it uninitialised"
            yield Finding(code="tensor-missing", what=what, fix="export the whole layer")


def _aux_layers(head: HeadFiles, target: dict[str, Any]):
    num_layers = int(target["num_hidden_layers"])
    default = [2, num_layers // 2, num_layers - 3]
    layers = head.config.get("eagle_aux_hidden_state_layer_ids")
    if layers is None:
        nested = (head.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        where = "is nested in eagle_config, where the GPU runner does not look" if nested else "is missing"
        what = f"eagle_aux_hidden_state_layer_ids {where}: vLLM silently takes {default}"
        wanted = nested or "the ids that training used"
        yield Finding(code="aux-layers-default", what=what, fix=f"write it at the top level of config.json: {wanted}")
        return nested or default
    if layers != sorted(set(layers)):
        what = f"eagle_aux_hidden_state_layer_ids {layers} are not ascending: vLLM feeds them in ascending order"
        yield Finding(code="aux-layers-order", what=what, fix="order the ids and the columns of fc.weight alike")
    if any(not 1 <= layer <= num_layers for layer in layers):
        what = f"eagle_aux_hidden_state_layer_ids {layers} reach outside 1..{num_layers}"
        yield Finding(code="aux-layers-range", what=what, fix="id k is the residual stream after k decoder layers")
    return layers


def _fc_width(head: HeadFiles, target: dict[str, Any], layers: list[int]) -> Iterator[Finding]:
    shape = head.shape("fc.weight")
    hidden = int(head.config.get("target_hidden_size") or target["hidden_size"])
    if shape is not None and shape[-1] != len(layers) * hidden:
        what = (
            f"fc.weight takes {shape[-1]} features, {len(layers)} hidden states of {hidden} give {len(layers) * hidden}"
        )
        yield Finding(code="fc-shape", what=what, fix="write the ids that training used, and the target's hidden size")
    written = head.config.get("num_aux_hidden_states", _layer_config(head).get("num_aux_hidden_states"))
    if len(layers) != 3 and written != len(layers):
        what = f"{len(layers)} hidden states are fused, but num_aux_hidden_states says {written}: vLLM assumes 3"
        yield Finding(code="num-aux", what=what, fix=f'write "num_aux_hidden_states": {len(layers)}')


def _norms(head: HeadFiles, speculators: bool) -> Iterator[Finding]:
    if "norm_before_residual" not in head.config:
        style, other = ("speculators", "Hugging Face") if speculators else ("Hugging Face", "speculators")
        what = (
            f"norm_before_residual is not written: vLLM takes {speculators} for a config in the style of {style}, and "
            f"{not speculators} in that of {other}"
        )
        yield Finding(code="norm-before-residual", what=what, fix="write what training used")
    for flag, prefix in NORM_FLAGS.items():
        has_tensors = any(name.startswith(prefix) for name in head.tensors)
        if has_tensors and not head.config.get(flag):
            what = f"{prefix}* is in the file, but {flag} is not set: vLLM drops it without a word"
            yield Finding(code="norm-dropped", what=what, fix=f'write "{flag}": true')
        if head.config.get(flag) and not has_tensors:
            what = f"{flag} is set, but {prefix}* is not in the file: it stays at its initial value"
            yield Finding(code="norm-missing", what=what, fix=f"export {prefix}*, or unset {flag}")


def _draft_vocabulary(head: HeadFiles, target: dict[str, Any]) -> Iterator[Finding]:
    vocab_size = int(target["vocab_size"])
    draft_size = int(head.config.get("draft_vocab_size") or vocab_size)
    rows = head.shape("lm_head.weight")
    if rows is None and draft_size != vocab_size:
        what = f"lm_head.weight is missing, and the target's has {vocab_size} rows instead of {draft_size}"
        yield Finding(code="lm-head-missing", what=what, fix="export the head's own lm_head")
    elif rows is not None and rows[0] != draft_size:
        what = f"lm_head.weight has {rows[0]} rows, draft_vocab_size says {draft_size}"
        yield Finding(code="draft-vocab-size", what=what, fix=f'write "draft_vocab_size": {rows[0]}')
    if draft_size == vocab_size:
        return
    if "d2t" not in head.tensors:
        what = "d2t is missing: every draft id would stand for the target id of the same number, and few are accepted"
        yield Finding(code="d2t-missing", what=what, fix="export d2t, int64 offsets: target id = i + d2t[i]")
        return
    offsets = head.integers("d2t")
    if offsets is None or len(offsets) != draft_size:
        what = f"d2t holds {len(offsets or [])} integers, draft_vocab_size is {draft_size}"
        yield Finding(code="d2t-shape", what=what, fix="export one int64 offset a draft token")
        return
    kept = head.integers("t2d") if "t2d" in head.tensors else None
    wanted = None if kept is None else [token for token, is_drafted in enumerate(kept) if is_drafted]
    yield from _offsets(offsets, wanted, vocab_size)


def _offsets(offsets: list[int], wanted: list[int] | None, vocab_size: int) -> Iterator[Finding]:
    """``wanted``: the drafted target ids by the file's own t2d, which settles it; None without one."""
    ids = sorted(i + offset for i, offset in enumerate(offsets))
    valid = len(set(ids)) == len(ids) and ids[0] >= 0 and ids[-1] < vocab_size
    looks_absolute = sorted(set(offsets)) == sorted(offsets) and min(offsets) >= 0 and max(offsets) < vocab_size
    if wanted is not None:
        absolute = sorted(offsets) == wanted and ids != wanted
        valid = ids == wanted
    else:
        # Of ascending ids many neighbours follow each other, and share an offset; ids themselves never repeat.
        absolute = looks_absolute and len(offsets) >= MIN_TELLING_TOKENS
    if valid and not absolute:
        return
    hint = (
        "they are target ids" if absolute else "draft ids share a target id, leave the vocabulary, or differ from t2d"
    )
    what = f"d2t does not hold offsets ({hint}): target id = i + d2t[i] is wrong, and few drafts are accepted"
    yield Finding(code="d2t-absolute" if absolute else "d2t-values", what=what, fix="subtract i from entry i")


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one spelling, whichever way they are written."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    rest = {
        key: float(value)
        for key, value in parameters.items()
        if key not in ("rope_type", "type", "rope_theta") and isinstance(value, int | float)
    }
    return {"rope_type": kind, "rope_theta": float(theta), **(rest if kind != "default" else {})}
