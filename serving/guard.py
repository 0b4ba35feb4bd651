"""Looks at requests before vLLM does: their size, and what they say about speculation. Pure ASGI; responses stream."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("vllm.specdec")

MAX_BYTES_VARIABLE = "SPECDEC_MAX_REQUEST_BYTES"
DEFAULT_MAX_BYTES = 8 * 2**20
WIDEST_DRAFT = 64  # tokens that a request may ask for where the server's largest K is not known
XARG = "specdec"  # the key in vllm_xargs
ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    409: "ConflictError",
    413: "RequestEntityTooLargeError",
    503: "ServiceUnavailableError",
}


def refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error in the shape of OpenAI's API, as vLLM gives them."""
    error = {"message": message, "type": ERROR_TYPES[status], "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


def max_request_bytes(text: str | None) -> int:
    """The limit from the environment; the default, and a line in the log, when it is not a positive whole number."""
    if not text:
        return DEFAULT_MAX_BYTES
    if re.fullmatch("0*[1-9][0-9]{0,14}", text):
        return int(text)
    logger.error("specdec: %s=%r is no number of bytes: it stays %d", MAX_BYTES_VARIABLE, text, DEFAULT_MAX_BYTES)
    return DEFAULT_MAX_BYTES


class RequestGuard:
    """Middleware for POST: 401 without an API key where there is one, 413 for a body over ``max_body_bytes``, 400 for a
    bad ``vllm_xargs.specdec``.

    On whatever path: vLLM takes prompts on some that its own key does not guard (``/tokenize``, ``/invocations``).

    The body is read as a whole, as vLLM would, and handed on; everything after it (a client that leaves) passes.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_draft_tokens: int | None = None,
        is_authorised: Callable[[str], bool] = lambda authorization: True,
    ) -> None:
        self.app, self.max_body_bytes, self.is_authorised = app, max_body_bytes, is_authorised
        self.max_draft_tokens = WIDEST_DRAFT if max_draft_tokens is None else max_draft_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if not self.is_authorised(headers.get("authorization", "")):
            await refusal(401, "this server wants its API key: Authorization: Bearer KEY")(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 15 or int(declared) > self.max_body_bytes):
            await self._too_large()(scope, receive, send)
            return
        messages: list[Message] = []
        num_bytes = 0
        while not messages or messages[-1].get("more_body", False):  # a disconnect has no more either
            messages.append(await receive())
            num_bytes += len(messages[-1].get("body", b""))
            if num_bytes > self.max_body_bytes:
                await self._too_large()(scope, receive, send)
                return
        complaint = bad_xarg(b"".join(message.get("body", b"") for message in messages), self.max_draft_tokens)
        if complaint:
            await refusal(400, complaint, param="vllm_xargs")(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    def _too_large(self) -> JSONResponse:
        return refusal(
            413,
            f"the request's body is larger than {self.max_body_bytes} bytes, the most that this server takes "
            f"({MAX_BYTES_VARIABLE} sets it)",
        )


def bad_xarg(body: bytes, max_draft_tokens: int) -> str | None:
    """What is wrong with ``vllm_xargs.specdec`` of a request's body; None when nothing is, or vLLM has to say it."""
    if XARG.encode() not in body:
        return None
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    xargs = tree.get("vllm_xargs") if isinstance(tree, dict) else None
    if not isinstance(xargs, dict) or XARG not in xargs or allowed(xargs[XARG], max_draft_tokens):
        return None
    return (
        f'vllm_xargs.{XARG} must be "auto", "off" or a number of draft tokens from 0 to {max_draft_tokens}, '
        f"got {json.dumps(xargs[XARG])[:100]}"
    )


def allowed(value: Any, max_draft_tokens: int) -> bool:
    """Whether a request may say this about its own speculation."""
    if isinstance(value, str):
        return value in ("auto", "off") or (bool(re.fullmatch("[0-9]{1,3}", value)) and int(value) <= max_draft_tokens)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= max_draft_tokens
