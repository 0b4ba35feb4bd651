"""What ``specdec serve`` adds to vLLM's HTTP server: status, policy, the live page, metrics, and a guard for requests.

A vLLM endpoint plugin (group ``vllm.endpoint_plugins``); vLLM loads it where ``VLLM_PLUGINS`` names it. It asks the
engine for all that it shows.
"""

from __future__ import annotations

import hmac
import json
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.datastructures import State
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from serving.engine_status import FACTS_VARIABLE, BadPolicyError, EngineStatus, EngineUnavailableError, read_facts
from serving.guard import MAX_BYTES_VARIABLE, RequestGuard, max_request_bytes, refusal
from serving.policy import parse_policy
from serving.prometheus import FreshMetrics, StatusCollector

PAGE = Path(__file__).parent / "page"
SHARED_ANSWER_SEC = 0.5  # several viewers get one answer
LONGEST_POLICY_BYTES = 1000
NO_STORE = {"Cache-Control": "no-store"}

Handler = Callable[[Request], Awaitable[Response]]


class SpecdecEndpoints:
    """vLLM makes one, attaches it to the application, then hands it the engine's client."""

    name = "specdec"
    required_tasks = ("generate",)

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """``registry``: where metrics go; the default is the one that vLLM shows on ``/metrics``."""
        self.registry = registry
        self.facts = read_facts(os.environ.get(FACTS_VARIABLE))
        self.engine: EngineStatus | None = None
        self.api_keys: list[str] = []

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the middleware around all of vLLM's."""
        app.add_middleware(
            RequestGuard,
            max_body_bytes=max_request_bytes(os.environ.get(MAX_BYTES_VARIABLE)),
            max_draft_tokens=self.facts.get("max_speculative_tokens"),
        )
        app.add_middleware(FreshMetrics, engine=lambda: self.engine)
        page = HTMLResponse(live_page(), headers=NO_STORE)

        async def show(request: Request) -> Response:
            return page

        async def to_page(request: Request) -> Response:
            return RedirectResponse("specdec/")  # relative: right behind a proxy's prefix as well

        for method, path, handler in (
            ("GET", "/specdec", to_page),
            ("GET", "/specdec/", show),
            ("GET", "/specdec/status", self.get_status),
            ("GET", "/specdec/policy", self.get_policy),
            ("PUT", "/specdec/policy", self.put_policy),
        ):
            app.add_api_route(path, answering(handler), methods=[method], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take the engine's client, and the API keys that vLLM itself asks for."""
        self.engine = EngineStatus(engine_client, self.facts)
        self.api_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        self.registry.register(StatusCollector(self.engine))

    async def status(self) -> dict[str, Any]:
        """The engine's status.

        Raises:
            EngineUnavailableError: there is none.
        """
        if self.engine is None:
            raise EngineUnavailableError("the server is starting")
        return await self.engine.status(max_age_sec=SHARED_ANSWER_SEC)

    async def get_status(self, request: Request) -> Response:
        """``GET /specdec/status``."""
        return JSONResponse(await self.status(), headers=NO_STORE)

    async def get_policy(self, request: Request) -> Response:
        """``GET /specdec/policy``."""
        return JSONResponse({"policy": (await self.status()).get("policy")}, headers=NO_STORE)

    async def put_policy(self, request: Request) -> Response:
        """``PUT /specdec/policy``; changes what everybody gets, so it needs vLLM's API key where there is one."""
        if not self._authorised(request):
            return refusal(401, "setting the policy needs this server's API key: Authorization: Bearer KEY")
        policy = read_policy(await _start_of_body(request))
        status = await self.status()
        if status.get("policy") is None:
            return refusal(409, f"this server has no policy to set: {status.get('reason') or 'K is static'}")
        widest = status.get("max_speculative_tokens")
        _, width = parse_policy(policy)
        if width is not None and widest is not None and width > widest:
            raise BadPolicyError(f"policy {policy} asks for more draft tokens than this server's {widest}")
        assert self.engine is not None  # status() has said so
        return JSONResponse({"policy": (await self.engine.set_policy(policy)).get("policy")}, headers=NO_STORE)

    def _authorised(self, request: Request) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        accepted = [hmac.compare_digest(given.encode(), key.encode()) for key in self.api_keys]
        return not self.api_keys or (scheme.lower() == "bearer" and any(accepted))


def answering(handler: Handler) -> Handler:
    """``handler`` with its exceptions as errors in the shape of OpenAI's API."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except EngineUnavailableError as error:
            return refusal(503, str(error))
        except ValueError as error:
            return refusal(400, str(error), param="policy")

    return answer


def read_policy(body: bytes) -> str:
    """The policy in a request's body: ``{"policy": "auto"}``, ``"auto"`` or the bare text.

    Raises:
        ValueError: it is none; says what is one.
    """
    text = body.decode(errors="replace").strip()
    try:
        tree = json.loads(text) if text.startswith(("{", "[", '"')) else text
    except (ValueError, RecursionError):
        tree = None
    policy = tree.get("policy") if isinstance(tree, dict) else tree
    if not isinstance(policy, str):
        raise ValueError('send {"policy": "auto"}, {"policy": "off"} or {"policy": "fixed:K"}, K a number')
    parse_policy(policy)
    return policy


async def _start_of_body(request: Request) -> bytes:
    """As much as a policy can need: a longer body is no policy."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_POLICY_BYTES:
            raise ValueError(f"a policy is a few letters, not more than {LONGEST_POLICY_BYTES} bytes")
    return body


def live_page() -> str:
    """The live page as one document: its style and scripts inside, nothing to fetch but the status."""
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "page.js"):
        page = page.replace(f"/* {name} */", (PAGE / name).read_text(encoding="utf-8"))
    return page
