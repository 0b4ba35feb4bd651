"""One streamed chat request against one arm, timed; every failure has a kind and none is dropped."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec import metrics
from specdec.evaluation.arms import Arm

if TYPE_CHECKING:
    import httpx

REQUEST_TIMEOUT_SEC = 900.0
ERROR_DETAIL_CHARS = 300

# The kinds of RequestResult.error, in the order a reader meets them.
ERROR_KINDS = (
    "http_429", "http_4xx", "http_5xx", "stream_error", "timeout", "disconnected", "truncated", "malformed",
    "missing_usage",
)  # fmt: skip


@dataclass(kw_only=True, slots=True)
class RequestResult:
    """What one request gave. Times are seconds since it was sent; tokens are the server's own count (usage)."""

    error: str | None = None  # one of ERROR_KINDS
    error_detail: str | None = None
    ttft_sec: float | None = None
    e2e_sec: float | None = None  # to the chunk that carried the last token
    chunk_gaps_sec: list[float] = field(default_factory=list)  # a chunk may hold several tokens
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # empty when the server does not return them
    finish_reason: str | None = None

    @property
    def tpot_sec(self) -> float | None:
        """Seconds per output token after the first; None after an error or without a second token."""
        if self.error or self.e2e_sec is None or self.ttft_sec is None or self.num_output_tokens is None:
            return None
        return metrics.tpot_sec(self.e2e_sec, self.ttft_sec, self.num_output_tokens)


class ArmClient:
    """HTTP client of one arm. Each request has its own connection, so no arm gains from a warm one."""

    def __init__(self, arm: Arm, timeout_sec: float = REQUEST_TIMEOUT_SEC) -> None:
        import httpx

        self.arm = arm
        self.timeout_sec = timeout_sec
        self._http = httpx.AsyncClient(
            base_url=arm.url,
            timeout=httpx.Timeout(timeout_sec, connect=30),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # a proxy would be part of the measurement
        )

    async def __aenter__(self) -> ArmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def chat(self, prompt: str, max_tokens: int, temperature: float | None) -> RequestResult:
        """Stream one answer; ``temperature`` None leaves sampling to the server's defaults. Never raises."""
        import httpx

        body: dict[str, Any] = {
            "model": self.arm.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": uuid.uuid4().hex,  # no prefix of an earlier request: every repeat starts cold
        }
        if temperature is not None:
            body["temperature"] = temperature
        result = RequestResult()
        try:
            async with asyncio.timeout(self.timeout_sec):
                await self._stream(body, result)
        except (TimeoutError, httpx.TimeoutException) as error:
            _fail(result, "timeout", f"{self.timeout_sec:g} s: {error}")
        except (httpx.TransportError, OSError) as error:
            _fail(result, "disconnected", f"{type(error).__name__}: {error}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            _fail(result, "malformed", f"{type(error).__name__}: {error}")
        return result

    async def _stream(self, body: dict[str, Any], result: RequestResult) -> None:
        sent = time.perf_counter()
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return _fail(result, _status_kind(response.status_code), f"{response.status_code}: {text}")
            complete = False
            async for data in _events(response):
                now = time.perf_counter() - sent
                if data == "[DONE]":
                    complete = True
                    continue  # to the end of the body: closing early would look like a client that went away
                chunk = json.loads(data)
                if "error" in chunk:
                    return _fail(result, "stream_error", str(chunk["error"]))
                _take_chunk(result, chunk, now)
        if not complete or result.finish_reason is None:
            _fail(result, "truncated", "the stream ended before the answer did")
        elif result.num_output_tokens is None:
            _fail(result, "missing_usage", "no usage in the stream: tokens can't be counted")

    async def next_token_logprobs(self, token_ids: list[int], num_top: int = 5) -> dict[int, float]:
        """Log-probabilities (nats) of the ``num_top`` likeliest tokens after ``token_ids``.

        Raises:
            httpx.HTTPError: the server can't be reached or refuses.
            ValueError: its answer holds no log-probabilities by token id.
        """
        body = {
            "model": self.arm.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0,
            "logprobs": num_top, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        response = await self._http.post("/v1/completions", json=body)
        response.raise_for_status()
        try:
            top = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(token.removeprefix("token_id:")): float(logprob) for token, logprob in top.items()}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"no log-probabilities in the answer of {self.arm.url}") from error

    async def detokenize(self, token_id: int) -> str | None:
        """Text of one token; None where the server can't tell."""
        import httpx

        try:
            response = await self._http.post("/detokenize", json={"model": self.arm.model, "tokens": [token_id]})
            response.raise_for_status()
            return str(response.json()["prompt"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def metrics_text(self) -> str:
        """The Prometheus page.

        Raises:
            ValueError: the server does not answer or has no such page.
        """
        import httpx

        try:
            response = await self._http.get("/metrics", timeout=30)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise ValueError(f"{self.arm.url}/metrics of the {self.arm.name} arm can't be read: {error}") from error
        return response.text


def _take_chunk(result: RequestResult, chunk: dict[str, Any], now: float) -> None:
    usage = chunk.get("usage")
    if usage:
        result.num_prompt_tokens = usage.get("prompt_tokens")
        result.num_output_tokens = usage["completion_tokens"]
    result.prompt_token_ids = chunk.get("prompt_token_ids") or result.prompt_token_ids
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        token_ids = choice.get("token_ids") or []
        finished = choice.get("finish_reason")
        # The role chunk comes ahead of the first token and holds none: it does not stop the clock.
        if token_ids or finished or delta.get("content") or delta.get("reasoning"):
            if result.ttft_sec is None:
                result.ttft_sec = now
            else:
                result.chunk_gaps_sec.append(now - (result.e2e_sec or result.ttft_sec))
            result.e2e_sec = now
        result.token_ids += token_ids
        result.finish_reason = finished or result.finish_reason


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """Server-sent events. Split at newlines only: httpx's own line reader also splits at U+2028 inside an answer."""
    pending = b""
    async for block in response.aiter_bytes():
        *lines, pending = (pending + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def _status_kind(status: int) -> str:
    if status == 429:
        return "http_429"
    return "http_5xx" if status >= 500 else "http_4xx"


def _fail(result: RequestResult, kind: str, detail: str) -> None:
    result.error = kind
    result.error_detail = detail[:ERROR_DETAIL_CHARS]
