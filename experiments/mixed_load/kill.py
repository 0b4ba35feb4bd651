"""kill -9 of the engine with requests in flight: what they get, when the server serves again, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from serving.reaper import descendants
from specdec.config import RunConfig

IN_FLIGHT, TOKENS, PATIENCE_SEC = 24, 512, 300.0


async def kill_engine(head: Path, config: RunConfig) -> dict[str, Any]:
    """Start a server of its own, kill its engine under load, wait until it answers again, and end it."""
    serve = config.serve
    settings = (
        f"target.dtype={config.target.dtype}", "serve.port=0", f"serve.max_model_len={serve.max_model_len}",
        f"serve.max_num_seqs={serve.max_num_seqs}", f"serve.kv_cache_gib={serve.kv_cache_gib}",
    )  # fmt: skip
    command = [sys.executable, "-m", "specdec", "serve", "--head", str(head), *(f"--set={each}" for each in settings)]
    with Path("runs/mixed_load/killed-server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        started_sec = time.monotonic()
        facts = json.loads(await asyncio.to_thread(process.stdout.readline))
        start_sec = time.monotonic() - started_sec
        found = await _kill(facts, process.pid)
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 120)
    left = [pid for pid in below if Path(f"/proc/{pid}").exists()]
    return {**found, "start_sec": round(start_sec, 1), "exit_status": code, "processes_left": len(left)}


async def _kill(facts: dict[str, Any], pid: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # the server closes what rests
    async with httpx.AsyncClient(base_url=facts["url"], timeout=120, limits=limits, trust_env=False) as client:

        async def ask(tokens: int) -> str:
            body = {"model": facts["model"], "prompt": "Count to ten.", "max_tokens": tokens, "ignore_eos": True}
            try:
                return str((await client.post("/v1/completions", json=body)).status_code)
            except httpx.HTTPError as error:
                return type(error).__name__

        in_flight = [asyncio.create_task(ask(TOKENS)) for _ in range(IN_FLIGHT)]
        await asyncio.sleep(5)
        [engine] = [each for each in descendants(pid) if b"VLLM::EngineCor" in _command(each)]
        os.kill(engine, signal.SIGKILL)
        killed_sec = time.monotonic()
        statuses = Counter(await asyncio.gather(*in_flight))
        answered_sec = time.monotonic() - killed_sec
        while (code := await ask(4)) != "200" and time.monotonic() - killed_sec < PATIENCE_SEC:
            await asyncio.sleep(0.5)
        again_sec = time.monotonic() - killed_sec
        status = (await client.get("/specdec/status")).json()
    return {
        "in_flight": IN_FLIGHT, "statuses": dict(statuses), "answered_sec": round(answered_sec, 1),
        "serves_again": code == "200", "serves_again_sec": round(again_sec, 1),
        "mode": status.get("mode"), "num_restarts": status.get("num_restarts"),
    }  # fmt: skip


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""
