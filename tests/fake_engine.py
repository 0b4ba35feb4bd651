"""A stand-in for vLLM's engine client: answers the monitor's commands with a status that tests shape."""

from __future__ import annotations

import asyncio
import json
import math
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import AsyncMock, patch

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.responses import JSONResponse

from serving.endpoints import SpecdecEndpoints


def make_status(**changes: Any) -> dict[str, Any]:
    """A status with all its keys: a server that speculates after a spell of plain decode."""
    status: dict[str, Any] = {
        "mode": "speculating",
        "policy": "auto",
        "num_speculative_tokens": 3,
        "max_speculative_tokens": 4,
        "timed_batch_sizes": [],
        "acceptance_length": 2.31,
        "per_position_rates": [0.68, 0.42, 0.24, 0.11],
        "conditional_rates": [0.68, 0.62, 0.57, 0.46],
        "trained": {"acceptance_length": 2.4, "conditional_rates": [0.71, 0.63, 0.6, 0.52]},
        "tokens_per_step": 2.02,
        "goodput_tok_per_sec": 61.4,
        "plain_tok_per_sec": 43.2,
        "fallback_share": 0.27,
        "alarm": None,
        "reason": "K=3 gives 61.4 tokens/s a sequence, K=4 58.9",
        "head": "eagle3",
        "head_dir": "/heads/r1",
        "swap": None,
        "target": "smollm2-135m",
        "uptime_sec": 4210.0,
        "batch": 4,
        "k_histogram": {"0": 5200, "2": 900, "3": 9100, "4": 2300},
        "totals": {
            "num_steps": 17500,
            "num_drafts": 49000,
            "num_draft_tokens": 147000,
            "num_accepted_tokens": 64200,
            "num_output_tokens": 134000,
            "num_sequence_steps": 66300,
            "drafted_per_position": [49000, 47000, 44000, 7000],
            "reached_per_position": [49000, 31900, 18500, 1900],
            "accepted_per_position": [33300, 19800, 10500, 600],
            "decode_sec": 2210.5,
            "fallback_sec": 596.8,
            "policy_failures": 0,
            "policy_usec_per_step": 38.2,
        },
        "by_span": {
            "think": {
                "num_drafts": 41000,
                "num_draft_tokens": 123000,
                "num_accepted_tokens": 51700,
                "acceptance_length": 2.26,
            },
            "answer": {
                "num_drafts": 8000,
                "num_draft_tokens": 24000,
                "num_accepted_tokens": 12500,
                "acceptance_length": 2.56,
            },
        },
        "by_output_position": [
            {"from": 0, "to": 256, "num_drafts": 21000, "num_accepted_tokens": 29400, "acceptance_length": 2.4},
            {"from": 256, "to": 1024, "num_drafts": 19000, "num_accepted_tokens": 24100, "acceptance_length": 2.27},
            {"from": 1024, "to": 4096, "num_drafts": 9000, "num_accepted_tokens": 10700, "acceptance_length": 2.19},
            {"from": 4096, "to": None, "num_drafts": 0, "num_accepted_tokens": 0, "acceptance_length": None},
        ],
        "history": _history(),
        "events": [
            {"at_sec": 12.0, "kind": "policy", "what": "K=4: start, not measured yet"},
            {"at_sec": 3790.0, "kind": "alarm", "what": "acceptance at position 1 is 0.41, trained 0.71"},
            {"at_sec": 3792.0, "kind": "policy", "what": "K=0: plain decode gives more at batch 16"},
            {"at_sec": 3950.0, "kind": "policy", "what": "K=3 gives 61.4 tokens/s a sequence, K=0 43.2"},
        ],
    }
    unknown = set(changes) - set(status)
    assert not unknown, f"no key of a status: {unknown}"
    return status | changes


def plain_status(**changes: Any) -> dict[str, Any]:
    """What a server without a head answers: little is known."""
    known = {"mode": "plain", "uptime_sec": 3.0, "k_histogram": {}, "totals": {}, "by_span": {}}
    empty = {"by_output_position": [], "history": [], "events": []}
    return dict.fromkeys(make_status()) | known | empty | changes


def _history() -> list[dict[str, Any]]:
    points = []
    for i in range(420):
        width = 4 if i < 3 else (0 if i < 160 else 3) if i > 18 else 4
        plain = 43.0 + 1.5 * math.sin(i / 31)
        tau = None if width == 0 else 2.3 + 0.18 * math.sin(i / 17) + 0.06 * math.sin(i * 2.3)
        goodput = plain * (0.98 if width == 0 else 0.86 if i < 20 else 1.41 + 0.05 * math.sin(i / 13))
        points.append(
            {
                "at_sec": 3780.0 + i,
                "num_speculative_tokens": width,
                "goodput_tok_per_sec": goodput,
                "plain_tok_per_sec": plain,
                "acceptance_length": tau,
                "batch": 4,
            }
        )
    return points


class FakeEngineClient:
    """vLLM's engine client as far as the endpoints use it; ``trouble`` makes it fail in one of the ways it can."""

    def __init__(self, status: dict[str, Any]) -> None:
        self.answer = status
        self.engine_core = self
        self.errored = False
        self.trouble: str | Exception | None = None  # "silent", or what is raised
        self.vllm_config = Namespace(
            scheduler_config=Namespace(max_num_seqs=4, async_scheduling=False),
            model_config=Namespace(max_model_len=1024),
            num_speculative_tokens=3,
        )
        self.generated: list[tuple[str, int]] = []  # request id, and how many ran beside it
        self.hangs = False  # whether requests never end
        self._running = 0
        self.commands: list[dict[str, Any]] = []

    async def generate(self, prompt: dict[str, Any], sampling: Any, request_id: str) -> AsyncIterator[None]:
        self._running += 1
        await asyncio.sleep(3600 if self.hangs else 0.01)
        self.generated.append((request_id, self._running))
        await asyncio.sleep(0.01)
        self._running -= 1
        yield None

    async def call_utility_async(self, method: str, command_json: str) -> str:
        assert method == "specdec"
        command = json.loads(command_json)
        self.commands.append(command)
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if self.trouble == "silent":
            await asyncio.Event().wait()
        if command["command"] == "swap":
            self.answer["head_dir"] = command["head_dir"]
        if command["command"] == "calibrated":
            self.answer["reason"] = "start: not measured yet"
        if command["command"] == "policy":
            if self.answer["policy"] is None:
                return json.dumps({"error": "there is no policy"})
            self.answer["policy"] = command["policy"]
        await asyncio.sleep(0)  # as the real one: not before the caller has let others run
        return json.dumps(self.answer)


def make_app(client: Any, api_key: list[str] | None = None, model: str = "") -> tuple[FastAPI, SpecdecEndpoints]:
    """An application as vLLM makes it: a core route, its metrics, the plugin in two phases, without calibration."""
    app = FastAPI()
    registry = CollectorRegistry(auto_describe=True)
    app.mount("/metrics", make_asgi_app(registry=registry))

    @app.post("/v1/completions")
    async def complete(request: Request) -> JSONResponse:
        return JSONResponse({"got_bytes": len(await request.body())})

    plugin = SpecdecEndpoints(registry)
    plugin.attach_router(app)
    with patch("serving.endpoints.calibrate", AsyncMock()):
        asyncio.run(plugin.init_state(client, app.state, Namespace(api_key=api_key, model=model)))
    return app, plugin
