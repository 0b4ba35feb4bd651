"""Constant load: plain, every fixed K, the policy, and the policy with a head of random weights, in slices of time.

Each arm is a server of its own that answers the same requests (``slices.py``). Before each load every arm runs for five
seconds that do not count: so long a policy may take to adapt. Servers that are started alike differ a little for as
long as they run: ``--lives 2`` measures all loads a second time, with servers started anew and other tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experiments.never_slower.slices import DEV_MODE, Request, SlicedArm, measure
from specdec.config import RunConfig
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import Arm, open_arms
from specdec.evaluation.suites import load_suite
from specdec.manifest import HeadManifest
from specdec.progress import progress_bar
from specdec.record import provenance, write_json_atomic

Started = dict[str, Arm]  # servers that answer, by name
WORK = Path("runs/never_slower")
LOADS = {1: 10, 2: 16, 4: 24, 8: 40, 16: 64, 32: 160}  # requests at a time, and how many tasks, times --passes
TEMPERATURES = (0.0, 0.6)
ADAPTATION_SEC = 5.0
WARM_UP_SEED = 1000  # of tasks that no load asks


def servers(head: Path, random_head: Path, num_seqs: int) -> tuple[list[ArmSpec], RunConfig]:
    """Plain, one for each fixed K, and the policy on both heads."""
    options = {"plain": {}}
    for name, path in (("auto", head), ("random", random_head)):
        options[name] = {"head": str(path), "serve.policy": "auto"}
    for width in range(1, HeadManifest.load(head).num_speculative_tokens + 1):
        options[f"k{width}"] = {"head": str(head), "serve.policy": f"fixed:{width}"}
    return [ArmSpec(name=name, options=each) for name, each in options.items()], server_config(num_seqs)


def server_config(num_seqs: int) -> RunConfig:
    """Of servers that share the machine."""
    config = RunConfig()
    config.serve.health_timeout_sec = 3600  # a server that is frozen answers no health check
    config.serve.max_model_len, config.serve.max_num_seqs, config.serve.kv_cache_gib = 1024, num_seqs, 0.5
    return config


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


def requests_of(count: int, max_tokens: int, seed: int, has_seeds: bool = True) -> list[Request]:
    """Tasks of the suite with answers of different lengths, so that prompts come one by one; ``max_tokens``: mean.

    With seeds all arms sample the same answers, as greedy ones are: what is accepted is no luck of one of them. Where
    rounding parts the answers it is, so no task is asked twice.
    """
    draw = random.Random(seed)
    items = load_suite("reasoning-gym", count, seed=seed).items
    lengths = [draw.randint(max_tokens // 2, max_tokens + max_tokens // 2) for _ in items]
    each = zip(items, lengths, strict=True)
    return [Request(item.turns[0], n, seed=i if has_seeds else None) for i, (item, n) in enumerate(each)]


def load_path(concurrency: int, temperature: float, life: int = 0) -> Path:
    """Where a load's measurement with the servers of this life lies."""
    return WORK / f"life{life}" / f"c{concurrency}-t{temperature}.json"


def shift_path(life: int) -> Path:
    """Where the measurement of the load that changes lies, with the servers of this life."""
    return WORK / f"shift{life}.json"


def timeline_path(life: int) -> Path:
    """Where the policy's status under that load stands, a line for each moment."""
    return WORK / f"timeline{life}.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """So many requests at a time, and so many times the load's number of them."""

    concurrency: int
    temperature: float = 0.0
    passes: int = 1
    mean_tokens: int = 64  # of an answer
    has_seeds: bool = True  # each request its own
    tasks: int = 0  # which ones


def measure_loads(specs: Sequence[ArmSpec], config: RunConfig, folder: Path, loads: Mapping[Path, Load]) -> None:
    """Write what each arm did under each load to the load's file, unless that is there already."""
    left = {path: load for path, load in loads.items() if not path.is_file()}
    if not left:
        return
    os.environ[DEV_MODE] = "1"
    with open_arms(specs, config, folder) as started:
        measure_started(started, left)


def measure_started(arms: Started, loads: Mapping[Path, Load]) -> None:
    """Write what each of these servers did under each load; they were started with ``DEV_MODE``."""
    for i, (path, load) in enumerate(loads.items()):
        print(json.dumps({"load": i + 1, "of": len(loads)}), flush=True)
        write_json_atomic(path, asyncio.run(_measure(arms, load)))


async def _measure(arms: Started, load: Load) -> dict[str, Any]:
    requests = requests_of(load.passes * LOADS[load.concurrency], load.mean_tokens, load.tasks, load.has_seeds)
    warm_up = requests_of(64, load.mean_tokens, WARM_UP_SEED, load.has_seeds)
    sliced = [SlicedArm(arm) for arm in arms.values()]
    most = len(sliced) * sum(request.max_tokens for request in requests)
    with progress_bar(f"{load.concurrency} at a time, T = {load.temperature:g}", most) as advance:
        try:
            work = await measure(sliced, requests, warm_up, load.concurrency, load.temperature, ADAPTATION_SEC, advance)
        finally:
            for arm in sliced:
                await arm.close()
    return {
        "concurrency": load.concurrency, "temperature": load.temperature, "num_requests": len(requests),
        "work": {name: asdict(each) for name, each in work.items()}, "provenance": provenance(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--lives", type=int, default=1)
    options = parser.parse_args()
    specs, config = servers(options.head, randomised(options.head, WORK / "random_head"), num_seqs=max(LOADS))
    for life in range(options.lives):
        loads = {
            load_path(concurrency, temperature, life): Load(
                concurrency=concurrency,
                temperature=temperature,
                passes=options.passes,
                mean_tokens=options.tokens,
                tasks=life,
            )
            for temperature in TEMPERATURES
            for concurrency in LOADS
        }
        measure_loads(specs, config, WORK / f"life{life}", loads)


if __name__ == "__main__":
    main()
