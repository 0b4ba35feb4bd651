"""On a GPU, at the true shape of an R1-Distill target: what each K costs, and what the policy makes of it.

    python experiments/gpu_serving/run.py TOKENIZER_DIR [--shape qwen-1.5b] [--loads 1,16,128] [--out FILE]

Weights are random, so drafts are accepted as often as vLLM is told to pretend (``synthetic``), or, in the arm of a
useless head, as often as random weights agree. All servers start together on one GPU; then one at a time gets a load,
in turn, for a few seconds, ``ROUNDS`` times over, and its output tokens are read from vLLM's own counter. The policy's
server is also measured at each K fixed, and at K = 0 beside one whose head runs in every step (``every_step``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from draft_training.heads import load_head
from draft_training.target_model import TargetModel
from experiments.never_slower.slices import TOKENS
from experiments.r1_shape.run import SHAPES
from serving.launch import ServerPlan, plan_server
from serving.sockets import free_port
from specdec.config import RunConfig, ServeConfig
from specdec.device import detect_device
from specdec.manifest import HeadManifest
from specdec.record import provenance, write_json_atomic
from specdec.targets import Target, resolve_target

WIDTH, NUM_DRAFTED, MAX_NUM_SEQS = 3, 32_000, 128
RATES = [0.73, 0.52, 0.36]  # pretended, of each position: 2.61 tokens a draft
SPEC_FLAG = "--speculative-config"
ROUNDS, RAMP_SEC, WINDOW_SEC, ADAPTATION_SEC = 3, 0.7, 2.0, 6.0
PROMPT_TOKENS, ANSWER_TOKENS = 64, 1500
# Arm -> the policy it starts with; cells: arm -> the policies it is measured at.
POLICIES = {"plain": None, "static": "static", "auto": "auto", "useless": "auto", "every_step": "off"}
CELLS = [
    ("plain", None), ("static", None), ("auto", "auto"), ("useless", "auto"),
    *[("auto", f"fixed:{width}") for width in range(WIDTH + 1)], ("every_step", "fixed:0"), ("plain", None),
]  # fmt: skip


def random_model(shape: str, tokenizer: Path, directory: Path) -> Target:
    """Target and EAGLE-3 head with random weights, as files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=131_072)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.save_pretrained(directory / "target")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, directory / "target" / name)
    run = RunConfig()
    run.target.name = str(directory / "target")
    target = resolve_target(run.target)
    spec = load_head("eagle3")
    options = spec.options_cls(draft_vocab_size=NUM_DRAFTED)
    head = spec.build(TargetModel.of(model), torch.arange(NUM_DRAFTED), options, WIDTH)
    (directory / "head").mkdir(exist_ok=True)
    head.export(directory / "head", torch.bfloat16)
    HeadManifest(
        head="eagle3", vllm_method=spec.vllm_method, num_speculative_tokens=WIDTH, target_name=target.name,
        target=target.fingerprint(), draft_vocab_size=NUM_DRAFTED,
    ).save(directory / "head")  # fmt: skip
    return target


def plan_of(name: str, target: Target, head: Path, port: int, extra: list[str]) -> ServerPlan:
    """How ``specdec serve`` would start the arm, its acceptance pretended unless it is the useless head's."""
    policy = POLICIES[name]
    serve = ServeConfig(max_num_seqs=MAX_NUM_SEQS, max_model_len=2048, port=port, policy=policy, preset="none")
    serve.speculation = policy is not None
    flags = ["--gpu-memory-utilization", "0.15", "--kv-cache-memory-bytes", str(4 << 30), *extra]
    if name == "every_step":
        flags += ["--worker-extension-cls", "experiments.gpu_serving.every_step.Worker"]
    manifest = HeadManifest.load(head)
    plan = plan_server(target, serve, RunConfig().target, detect_device(), head, manifest, flags)
    if policy is None:
        return plan
    at = plan.argv.index(SPEC_FLAG) + 1
    speculative = json.loads(plan.argv[at])
    if name != "useless":
        speculative |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": RATES}
    argv = [*plan.argv[:at], json.dumps(speculative), *plan.argv[at + 1 :]]
    return dataclasses.replace(plan, argv=argv)


@contextlib.contextmanager
def started(plans: dict[str, ServerPlan], logs: Path) -> Iterator[dict[str, str]]:
    """The root URL of each arm's server, once all answer.

    Raises:
        RuntimeError: one ended first.
    """
    processes = {}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for name, plan in plans.items():
            # Each its own cache, for they start together.
            env = {**os.environ, **plan.env, "VLLM_CACHE_ROOT": str(logs / f"cache-{name}")}
            with (logs / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    plan.argv, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        waiting, begun = set(plans), time.monotonic()
        while waiting:
            for name in sorted(waiting):
                if processes[name].poll() is not None:
                    raise RuntimeError(f"{name} ended: see its log in {logs}")
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{plans[name].url}/health", timeout=5, trust_env=False).status_code == 200:
                        waiting.discard(name)
                        print(f"{name} ready after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            time.sleep(0.5)
        yield {name: plan.url for name, plan in plans.items()}
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


@contextlib.asynccontextmanager
async def under_load(http: httpx.AsyncClient, model: str, concurrency: int, temperature: float) -> AsyncIterator[None]:
    """So many requests at a time, until the block ends."""
    draw = random.Random(0)

    async def client() -> None:
        while True:
            prompt = [draw.randrange(30_000) for _ in range(PROMPT_TOKENS)]
            body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
            answer = await http.post("/v1/completions", json={**body, "temperature": temperature})
            answer.raise_for_status()

    tasks = [asyncio.create_task(client()) for _ in range(concurrency)]
    try:
        yield
    finally:
        failed = [task.exception() for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if failed:
            raise RuntimeError(f"a request failed: {failed[0]}")


async def _counted(http: httpx.AsyncClient) -> tuple[float, float]:
    """Output tokens so far, and when they were read."""
    page = (await http.get("/metrics")).raise_for_status().text
    return sum(float(value) for value in TOKENS.findall(page)), time.perf_counter()


async def visit(
    url: str, model: str, concurrency: int, temperature: float, policy: str | None, ramp_sec: float
) -> tuple[float, dict[str, Any]]:
    """Tokens a second, and the server's own figures of the window."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as http:
        if policy is not None:
            (await http.put("/specdec/policy", json={"policy": policy})).raise_for_status()
        async with under_load(http, model, concurrency, temperature):
            await asyncio.sleep(ramp_sec)
            before, begun = await _counted(http)
            await asyncio.sleep(WINDOW_SEC)
            after, ended = await _counted(http)
            status = (await http.get("/specdec/status")).json()
        for _ in range(40):  # until what was cut off is gone
            page = (await http.get("/metrics")).text
            if not any(map(float, re.findall(r"^vllm:num_requests_running\{.*\}\s+(\S+)", page, re.MULTILINE))):
                break
            await asyncio.sleep(0.05)
    kept = ("mode", "num_speculative_tokens", "acceptance_length", "k_histogram", "reason", "totals")
    return (after - before) / (ended - begun), {key: status.get(key) for key in kept}


def measure(
    urls: dict[str, str], model: str, loads: list[int], temperature: float, out: Path, facts: dict[str, Any]
) -> None:
    """Visit every cell of every load ``ROUNDS`` times, in turn, and write what came out after each load."""
    points = []
    for concurrency in loads:
        speeds: dict[str, list[float]] = {}
        figures: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(ROUNDS):
            for arm, policy in CELLS:
                cell = arm if policy in (None, "auto") else f"{arm}-{policy.replace('fixed:', 'k')}"
                ramp = RAMP_SEC if cell in seen or policy != "auto" else ADAPTATION_SEC
                seen.add(cell)
                speed, figures[cell] = asyncio.run(visit(urls[arm], model, concurrency, temperature, policy, ramp))
                speeds.setdefault(cell, []).append(speed)
        print(concurrency, {cell: round(statistics.median(each)) for cell, each in speeds.items()}, flush=True)
        points.append(
            {"concurrency": concurrency, "temperature": temperature, "tok_per_sec": speeds, "status": figures}
        )
        write_json_atomic(out, {"points": points, "provenance": provenance(**facts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen-1.5b")
    parser.add_argument("--loads", default="1,16,128", help="requests at a time")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_serving"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("vllm", nargs="*", help="after --: further flags of vLLM's own")
    args = parser.parse_args()
    target = random_model(args.shape, args.tokenizer, args.work)
    plans = {name: plan_of(name, target, args.work / "head", free_port("127.0.0.1"), args.vllm) for name in POLICIES}
    torch.cuda.empty_cache()
    facts = {"shape": args.shape, "settings": sys.argv[1:], "accelerator": torch.cuda.get_device_name()}
    with started(plans, args.work / "logs") as urls:
        loads = [int(each) for each in args.loads.split(",")]
        measure(urls, plans["plain"].served_model_name, loads, args.temperature, args.out, facts)


if __name__ == "__main__":
    main()
