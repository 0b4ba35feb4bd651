"""What the R1-Distill family is served with by default. Each default loses against a setting or a flag after ``--``."""

from __future__ import annotations

import json

from serving.flags import ServerFlags
from specdec.config import ServeConfig
from specdec.device import Device
from specdec.r1 import TEMPLATE_PATH, has_r1_turns
from specdec.targets import R1_SAMPLING, Target

AUTO, NONE = "auto", "none"
R1_MODEL_LEN = 32_768  # what DeepSeek evaluated with; the configurations say 131,072
WHOLE_KV_DTYPES = ("auto", "float16", "bfloat16")


def preset_flags(target: Target, serve: ServeConfig, device: Device, user: ServerFlags) -> dict[str, str]:
    """vLLM's flags for the target's family; empty for other targets, and with ``serve.preset=none``.

    Raises:
        ValueError: ``serve.preset`` is neither auto nor none.
    """
    if serve.preset not in (AUTO, NONE):
        raise ValueError(f"preset must be {AUTO} or {NONE}, got {serve.preset!r}")
    if serve.preset == NONE or not target.is_r1_distill:
        return {}
    flags = {"--reasoning-parser": "deepseek_r1"}
    if "--generation-config" not in user:  # a user who asks for other defaults gets them
        flags["--override-generation-config"] = json.dumps({**R1_SAMPLING, **target.sampling})
    if not target.chat_template or has_r1_turns(target.chat_template):  # a fine-tune may have turns of its own
        flags["--chat-template"] = str(TEMPLATE_PATH)
    is_length_open = device.kind != "cpu" and serve.max_model_len is None and "--max-model-len" not in user
    if is_length_open and target.max_position_embeddings > R1_MODEL_LEN:
        # The length is then what fits the GPU's memory; this key of the model's configuration bounds it.
        flags["--hf-overrides"] = json.dumps({"max_seq_len": R1_MODEL_LEN})
    return flags


def quantized_cache_warning(user: ServerFlags) -> str | None:
    """What to say about a quantised KV cache; None without one."""
    dtype = user.get("--kv-cache-dtype")
    if dtype is None or dtype in WHOLE_KV_DTYPES:
        return None
    return (
        f"--kv-cache-dtype {dtype}: a quantised KV cache can cost small reasoning models accuracy; measure yours with "
        "`specdec eval` before you rely on it"
    )
