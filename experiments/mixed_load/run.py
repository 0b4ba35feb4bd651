"""A thousand requests of every kind at once, and the policy changed all the time: no dead engine, no wrong status.

Whatever is asked at temperature 0 (with stop strings, a schema, streamed, broken off) is compared with what a plain
server gave one by one; beside it stands how often that server differs from itself when it gets them many at once. In
float32, where few logits tie.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from experiments.mixed_load.kill import kill_engine
from experiments.mixed_load.requests import Request, make_requests
from specdec.config import RunConfig
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import open_arms
from specdec.progress import progress_bar
from specdec.record import provenance, write_json_atomic

OUT = Path(__file__).with_name("result.json")
CONCURRENCY, MAX_MODEL_LEN = 24, 1024


async def send(client: httpx.AsyncClient, request: Request) -> tuple[int | str, str]:
    """Status (or what went wrong) and text."""
    content = request.body if isinstance(request.body, bytes) else json.dumps(request.body).encode()
    headers = {"Content-Type": "application/json"}
    text, chunks = "", 0
    try:
        async with client.stream("POST", request.path, content=content, headers=headers) as response:
            if not (isinstance(request.body, dict) and request.body.get("stream")):
                body = json.loads(await response.aread())
                choice = (body.get("choices") or [{}])[0]
                return response.status_code, choice.get("text") or (choice.get("message") or {}).get("content") or ""
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return "error in the stream", text
                text += "".join(each["delta"].get("content") or "" for each in chunk["choices"])
                chunks += 1
                if request.abort_after is not None and chunks > request.abort_after:
                    break
            return response.status_code, text
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        return type(error).__name__, text


async def send_all(url: str, requests: list[Request], concurrency: int, what: str) -> list[tuple[int | str, str]]:
    gate = asyncio.Semaphore(concurrency)
    with progress_bar(what, len(requests)) as advance:
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:

            async def one(request: Request) -> tuple[int | str, str]:
                async with gate:
                    found = await send(client, request)
                advance(1, request.kind)
                return found

            return await asyncio.gather(*(one(request) for request in requests))


async def change_policies(url: str, statuses: Counter[int | str]) -> None:
    rng = random.Random(1)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        while True:
            policy = rng.choice(["auto", "auto", "off", "fixed:0", "fixed:1", "fixed:3"])
            statuses[(await client.put("/specdec/policy", json={"policy": policy})).status_code] += 1
            await asyncio.sleep(0.5)


async def measure(plain: str, spec: str, model: str, count: int) -> dict[str, Any]:
    requests = make_requests(count, model, MAX_MODEL_LEN)
    certain = {key(each): each for request in requests if (each := request.reference) is not None}
    alone = await send_all(plain, list(certain.values()), 1, "plain, one by one")
    reference = {name: text for name, (_, text) in zip(certain, alone, strict=True)}
    together = await send_all(plain, list(certain.values()), CONCURRENCY, "plain, many at once")
    policies: Counter[int | str] = Counter()
    changing = asyncio.create_task(change_policies(spec, policies))
    answers = await send_all(spec, requests, CONCURRENCY, "everything at once")
    changing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await changing
    async with httpx.AsyncClient(base_url=spec, timeout=30, trust_env=False) as client:
        status = (await client.get("/specdec/status")).json()
    found: dict[str, Counter[str]] = {}
    wrong = []
    for request, (code, _) in zip(requests, answers, strict=True):
        found.setdefault(request.kind, Counter())[str(code)] += 1
        if code != request.status:
            wrong.append({"kind": request.kind, "expected": request.status, "got": code})
    compared = {
        kind: [
            is_equal(reference[key(each)], text, request.abort_after is not None)
            for request, (_, text) in zip(requests, answers, strict=True)
            if request.kind == kind and (each := request.reference) is not None
        ]
        for kind in found
    }
    equal = [each for kind in compared.values() for each in kind]
    return {
        "num_requests": count, "statuses": {kind: dict(each) for kind, each in sorted(found.items())}, "wrong": wrong,
        "policy_changes": {str(code): number for code, number in policies.items()},
        "identity_rate": sum(equal) / len(equal), "num_compared": len(equal),
        "equal_of_kind": {kind: [sum(each), len(each)] for kind, each in sorted(compared.items()) if each},
        "plain_identity_rate_many_at_once": sum(
            reference[name] == text for name, (_, text) in zip(certain, together, strict=True)
        ) / len(certain),
        "status_after": {key: status.get(key) for key in ("mode", "policy", "reason", "uptime_sec", "k_histogram")},
        "num_restarts": status.get("num_restarts"),
    }  # fmt: skip


def key(request: Request) -> str:
    """Equal for equal questions."""
    return json.dumps([request.path, request.body], sort_keys=True)


def is_equal(reference: str, text: str, is_broken_off: bool) -> bool:
    return bool(text) and reference.startswith(text) if is_broken_off else reference == text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, default=Path("runs/demo/head"))
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    config = RunConfig()
    config.target.dtype = "float32"  # in bf16 a tie parts even equal servers, as soon as they batch differently
    config.serve.max_model_len, config.serve.max_num_seqs, config.serve.kv_cache_gib = MAX_MODEL_LEN, 16, 1
    head = {"head": str(options.head), "serve.policy": "auto"}
    specs = [ArmSpec(name="plain"), ArmSpec(name="spec", options=head)]
    with open_arms(specs, config, Path("runs/mixed_load")) as arms:
        urls = arms["plain"].url, arms["spec"].url
        result = asyncio.run(measure(*urls, arms["plain"].model, options.requests))
    result["engine_killed"] = asyncio.run(kill_engine(options.head, config))
    result["provenance"] = provenance(head=str(options.head))
    write_json_atomic(OUT, result)
    print(json.dumps({name: value for name, value in result.items() if name not in ("provenance", "statuses")}))
    if result["wrong"] or result["num_restarts"]:
        raise SystemExit("a status was wrong, or the engine died: see result.json")


if __name__ == "__main__":
    main()
