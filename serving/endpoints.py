"""What ``specdec serve`` adds to vLLM's HTTP server: status, policy, another head, the live page, metrics, a guard.

A vLLM endpoint plugin (group ``vllm.endpoint_plugins``); vLLM loads it where ``VLLM_PLUGINS`` names it. It asks the
engine for all that it shows.
"""

from __future__ import annotations

import asyncio
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

from serving.calibration import calibrate
from serving.engine_status import (
    FACTS_VARIABLE,
    BadPolicyError,
    EngineStatus,
    EngineUnavailableError,
    SwapRefusedError,
    read_facts,
)
from serving.guard import MAX_BYTES_VARIABLE, RequestGuard, max_request_bytes, refusal
from serving.head_check import RunningHead
from serving.kept_policy import keep_policy
from serving.policy import parse_policy
from serving.prometheus import FreshMetrics, StatusCollector
from specdec.config import TargetConfig
from specdec.targets import resolve_target

PAGE = Path(__file__).parent / "page"
SHARED_ANSWER_SEC = 0.5  # several viewers get one answer
LIVE_SEC = 10.0  # an answer counts that long as a sign of life: one that comes late is heard by the next check
LIVE_ANSWER_SEC = 3.0  # less than the supervisor's patience with one check
LONGEST_POLICY_BYTES = 1000
LONGEST_PATH_BYTES = 10_000
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
        self.target_dir = ""
        self.started_with: RunningHead | str = "the server is starting"  # or why it is not known
        self._swap = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the middleware around all of vLLM's."""
        app.add_middleware(
            RequestGuard,
            max_body_bytes=max_request_bytes(os.environ.get(MAX_BYTES_VARIABLE)),
            max_draft_tokens=self.facts.get("max_speculative_tokens") or None,  # 0: plain, where any number is met
            is_authorised=self.is_authorised,
        )
        app.add_middleware(FreshMetrics, engine=lambda: self.engine)
        page = HTMLResponse(live_page(), headers=NO_STORE)

        async def show(request: Request) -> Response:
            return page

        async def to_page(request: Request) -> Response:
            return RedirectResponse("specdec/")  # relative: right behind a proxy's prefix as well

        for method, path, handler, param in (
            ("GET", "/specdec", to_page, None),
            ("GET", "/specdec/", show, None),
            ("GET", "/specdec/live", self.get_live, None),
            ("GET", "/specdec/status", self.get_status, None),
            ("GET", "/specdec/policy", self.get_policy, None),
            ("PUT", "/specdec/policy", self.put_policy, "policy"),
            ("POST", "/specdec/head", self.post_head, "path"),
        ):
            app.add_api_route(path, answering(handler, param), methods=[method], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take the engine's client, and the API keys that vLLM itself asks for."""
        self.engine = EngineStatus(engine_client, self.facts)
        self.api_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        self.registry.register(StatusCollector(self.engine))
        self.target_dir = str(getattr(args, "model", ""))
        self.started_with = _started_with(self.facts.get("head_dir"))
        await calibrate(engine_client, self.engine)

    async def status(self, max_age_sec: float = SHARED_ANSWER_SEC, timeout_sec: float | None = None) -> dict[str, Any]:
        """The engine's status; see ``EngineStatus.status``.

        Raises:
            EngineUnavailableError: there is none.
        """
        if self.engine is None:
            raise EngineUnavailableError("the server is starting")
        return await self.engine.status(max_age_sec, timeout_sec)

    async def get_live(self, request: Request) -> Response:
        """``GET /specdec/live``: 503 while the engine answers nothing. vLLM's ``/health`` knows of its death alone."""
        await self.status(LIVE_SEC, LIVE_ANSWER_SEC)
        return JSONResponse({"live": True}, headers=NO_STORE)

    async def get_status(self, request: Request) -> Response:
        """``GET /specdec/status``."""
        return JSONResponse(await self.status(), headers=NO_STORE)

    async def get_policy(self, request: Request) -> Response:
        """``GET /specdec/policy``."""
        return JSONResponse({"policy": (await self.status()).get("policy")}, headers=NO_STORE)

    async def put_policy(self, request: Request) -> Response:
        """``PUT /specdec/policy``; changes what everybody gets, so it needs vLLM's API key where there is one."""
        if not self.is_authorised(request.headers.get("Authorization", "")):
            return refusal(401, "setting the policy needs this server's API key: Authorization: Bearer KEY")
        policy = read_policy(await _start_of_body(request, LONGEST_POLICY_BYTES))
        status = await self.status()
        if status.get("policy") is None:
            return refusal(409, f"this server has no policy to set: {status.get('reason') or 'K is static'}")
        widest = status.get("max_speculative_tokens")
        _, width = parse_policy(policy)
        if width is not None and widest is not None and width > widest:
            raise BadPolicyError(f"policy {policy} asks for more draft tokens than this server's {widest}")
        assert self.engine is not None  # status() has said so
        status = await self.engine.set_policy(policy)
        keep_policy(policy)
        return JSONResponse({"policy": status.get("policy")}, headers=NO_STORE)

    async def post_head(self, request: Request) -> Response:
        """``POST /specdec/head``: the head in a directory drafts from the next step on, and is watched.

        Everything that can be said against it is said before the engine hears of it: 409 with the reason.
        """
        directory = read_directory(await _start_of_body(request, LONGEST_PATH_BYTES))
        async with self._swap:
            status = await self.status()
            assert self.engine is not None  # status() has said so
            try:
                order = await asyncio.to_thread(self._order, directory, status.get("max_speculative_tokens") or 0)
                status = await self.engine.swap_head(order)
            except (ValueError, SwapRefusedError) as error:
                return refusal(409, f"the head stays as it is: {error}", param="path")
        found = {key: status.get(key) for key in ("head", "head_dir", "swap")}
        return JSONResponse(found, headers=NO_STORE)

    def _order(self, directory: Path, num_speculative_tokens: int) -> dict[str, Any]:
        """What the engine has to know of a head that fits.

        Raises:
            ValueError: it does not.
        """
        if isinstance(self.started_with, str):
            raise ValueError(self.started_with)
        target = resolve_target(TargetConfig(name=self.target_dir))
        head = self.started_with.check_successor(directory, target, num_speculative_tokens)
        return {
            "head": head.manifest.head,
            "head_dir": str(directory),
            "method": head.manifest.vllm_method,
            "conditional_rates": head.manifest.conditional_rates,
            "layout": head.layout,
            "running": self.facts["head_dir"],
        }

    def is_authorised(self, authorization: str) -> bool:
        """Whether this ``Authorization`` header holds one of vLLM's API keys, or none is needed."""
        scheme, _, given = authorization.partition(" ")
        accepted = [hmac.compare_digest(given.encode(), key.encode()) for key in self.api_keys]
        return not self.api_keys or (scheme.lower() == "bearer" and any(accepted))


def answering(handler: Handler, param: str | None) -> Handler:
    """``handler`` with its exceptions as errors in the shape of OpenAI's API; ``param``: what is read of its body."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except EngineUnavailableError as error:
            return refusal(503, str(error))
        except ValueError as error:
            return refusal(400, str(error), param=param)

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


def read_directory(body: bytes) -> Path:
    """The directory in a request's body, ``{"path": "/heads/new"}``.

    Raises:
        ValueError: there is none.
    """
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        tree = None
    path = tree.get("path") if isinstance(tree, dict) else None
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise ValueError('send {"path": "/heads/new"}, the absolute path of a head directory on the server\'s machine')
    return Path(path)


def _started_with(directory: str | None) -> RunningHead | str:
    if directory is None:
        return "this server was not started with a head of `specdec train` (--head): there is none to swap"
    try:
        return RunningHead.read(Path(directory))
    except ValueError as error:
        return f"the head that this server was started with can't be read any more: {error}"


async def _start_of_body(request: Request, max_bytes: int) -> bytes:
    """All of a body that needs only a few bytes.

    Raises:
        ValueError: it is longer.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ValueError(f"a body of not more than {max_bytes} bytes is wanted here")
    return body


def live_page() -> str:
    """The live page as one document: its style and scripts inside, nothing to fetch but the status."""
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "page.js"):
        page = page.replace(f"/* {name} */", (PAGE / name).read_text(encoding="utf-8"))
    return page
