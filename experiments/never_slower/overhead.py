"""What the control costs the engine at 256 requests: microseconds a step in a real server, beside the step itself."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import httpx

from experiments.never_slower.steady import WORK, servers
from specdec.evaluation.arms import open_arms
from specdec.progress import progress_bar

NUM_REQUESTS, TOKENS, ROUNDS = 256, 48, 5


async def load(client: httpx.AsyncClient, model: str) -> None:
    """All requests at once, of one length, so that the batch is full while they decode."""

    async def one(number: int) -> None:
        body = {
            "model": model, "prompt": f"Tell me about the number {number}.", "max_tokens": TOKENS, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        (await client.post("/v1/completions", json=body)).raise_for_status()

    await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))


async def totals(client: httpx.AsyncClient) -> dict[str, Any]:
    await asyncio.sleep(1.0)  # an answer may be shared for half a second
    return (await client.get("/specdec/status")).raise_for_status().json()["totals"]


async def rounds(url: str, model: str) -> list[dict[str, float]]:
    """Of each round: microseconds of the control and of the whole, a decode step; and the sequences in it."""
    found = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # the server closes what rests
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        await load(client, model)
        with progress_bar("policy overhead", ROUNDS) as advance:
            before = await totals(client)
            for _ in range(ROUNDS):
                await load(client, model)
                after = await totals(client)
                num_steps = after["num_steps"] - before["num_steps"]
                control_usec = sum(
                    sign * each["policy_usec_per_step"] * each["num_steps"] for sign, each in ((1, after), (-1, before))
                )
                found.append(
                    {
                        "control_usec": control_usec / num_steps,
                        "step_usec": 1e6 * (after["decode_sec"] - before["decode_sec"]) / num_steps,
                        "sequences": (after["num_sequence_steps"] - before["num_sequence_steps"]) / num_steps,
                    }
                )
                before = after
                advance(1, f"{NUM_REQUESTS} requests")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    head = parser.parse_args().head
    path = WORK / "overhead.json"
    if path.is_file():
        return
    specs, config = servers(head, head, num_seqs=NUM_REQUESTS)
    config.serve.kv_cache_gib = 2
    with open_arms([spec for spec in specs if spec.name == "auto"], config, WORK / "overhead") as started:
        found = asyncio.run(rounds(started["auto"].url, started["auto"].model))
    control = [each["control_usec"] for each in found]
    figures = {
        "policy_overhead_usec": statistics.median(control),
        "policy_overhead_usec_range": [min(control), max(control)],
        "policy_overhead_share": statistics.median(each["control_usec"] / each["step_usec"] for each in found),
        "policy_overhead_step_usec": statistics.median(each["step_usec"] for each in found),
        "policy_overhead_num_requests": statistics.median(each["sequences"] for each in found),
    }
    path.write_text(json.dumps(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
