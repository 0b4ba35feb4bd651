"""The embedded target with 8-bit weights, in the format of compressed-tensors: one scale an output channel.

    python experiments/other_arms/quantise.py OUT_DIR

Rounded to the nearest, activations quantised token by token as they come (W8A8): the plainest quantisation that vLLM's
CPU build serves. Its fp8 kernels want AMX, and its way round them calls an operator that the build lacks.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from specdec.config import TargetConfig
from specdec.targets import resolve_target

NUM_LEVELS = 127


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(int8 [out, in], scale [out, 1])`` of ``weight`` [out, in]."""
    scale = weight.float().abs().amax(1, keepdim=True) / NUM_LEVELS
    return (weight.float() / scale).round().to(torch.int8), scale.to(torch.bfloat16)


def format_of(weights: str, activations: str) -> dict[str, object]:
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": weights, "dynamic": False},
        "input_activations": {**numbers, "strategy": activations, "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def main() -> None:
    source, out = resolve_target(TargetConfig()).path, Path(sys.argv[1])
    shutil.copytree(
        source, out, ignore=shutil.ignore_patterns("*.safetensors", "specdec-target.json"), dirs_exist_ok=True
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale"] = quantised(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps(config | {"quantization_config": format_of("channel", "token")}, indent=2)
    )


if __name__ == "__main__":
    main()
