"""Constant load: plain, every fixed K, the policy, and the policy with a head of random weights, interleaved.

The fixed K are one server whose requests carry their K; the policy's servers see none of these requests. Plain is
measured twice, to see what the ratio of two equal arms is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from specdec.config import RunConfig
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import Arm, open_arms
from specdec.manifest import HeadManifest

WORK = Path("runs/never_slower")
# Few requests where they come one by one, several rounds where many run at once.
LOADS = (("1,2,4", 10), ("8,16,32", 64))
TEMPERATURES = (0.0, 0.6)
AGAIN = "plain_again"
FIRST_PORT = 8720  # fixed, so that an interrupted run finds the same arms


def servers(head: Path, random_head: Path, num_seqs: int) -> tuple[list[ArmSpec], RunConfig]:
    """Plain, a server for the fixed K, and the policy on both heads."""
    options = {
        "plain": {},
        "fixed": {"head": str(head), "serve.policy": f"fixed:{HeadManifest.load(head).num_speculative_tokens}"},
        "auto": {"head": str(head), "serve.policy": "auto"},
        "random": {"head": str(random_head), "serve.policy": "auto"},
    }
    specs = [
        ArmSpec(name=name, options={**each, "serve.port": str(FIRST_PORT + i)})
        for i, (name, each) in enumerate(options.items())
    ]
    config = RunConfig()
    config.serve.max_model_len, config.serve.max_num_seqs, config.serve.kv_cache_gib = 1024, num_seqs, 1
    return specs, config


def randomised(head: Path, directory: Path) -> Path:
    """A copy of the head whose matrices are noise of the same scale."""
    shutil.copytree(head, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("work", "rows"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = noise.to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def evaluate(out: Path, arms: list[str], *settings: str) -> None:
    """One ``specdec eval`` over servers that run. It resumes by itself; one that is finished is not repeated."""
    if finished(out):
        return
    command = [sys.executable, "-m", "specdec", "eval", "--out", str(out)]
    for arm in arms:
        command += ["--arm", arm]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def finished(out: Path) -> bool:
    """Whether this measurement has its result."""
    path = out / "result.json"
    return path.is_file() and not json.loads(path.read_text())["interrupted"]


def arms_of(started: dict[str, Arm], max_draft_tokens: int) -> list[str]:
    fixed = [f"k{k}={started['fixed'].url},xargs.specdec={k}" for k in range(1, max_draft_tokens + 1)]
    again = f"{AGAIN}={started['plain'].url}"
    return [*(f"{name}={started[name].url}" for name in ("plain", "auto", "random")), again, *fixed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    specs, config = servers(options.head, randomised(options.head, WORK / "random_head"), num_seqs=32)
    width = HeadManifest.load(options.head).num_speculative_tokens
    with open_arms(specs, config, WORK) as started:
        arms = arms_of(started, width)
        for concurrency, num_prompts in LOADS:
            for temperature in TEMPERATURES:
                modes = (
                    ["eval.sampled=false", f"eval.repeats={options.repeats}"]
                    if temperature == 0
                    else ["eval.greedy=false", f"eval.temperature={temperature}"]
                )
                evaluate(
                    WORK / f"c{concurrency.replace(',', '-')}-t{temperature}",
                    arms,
                    "eval.suites=[reasoning-gym]",
                    f"eval.concurrency=[{concurrency}]",
                    f"eval.num_prompts={num_prompts}",
                    f"eval.max_new_tokens={options.tokens}",
                    "eval.distribution_samples=0",
                    *modes,
                )


if __name__ == "__main__":
    main()
