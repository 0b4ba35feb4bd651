"""One streamed request against one arm, timed; every failure has a kind and none is dropped."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from specdec.evaluation.arms import Arm, auth_headers
from specdec.evaluation.records import RequestResult
from specdec.evaluation.stream import EventReader, StreamReader
from specdec.traces import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    import httpx

REQUEST_TIMEOUT_SEC = 900.0
MIN_CLOCK_JUMP_SEC = 1.0  # below it is what time synchronisation does all day
END_OF_THINKING = f"\n{THINK_CLOSE}\n\n"


class ArmClient:
    """HTTP client of one arm. Each request has its own connection, so no arm gains from a warm one."""

    def __init__(self, arm: Arm, timeout_sec: float = REQUEST_TIMEOUT_SEC) -> None:
        import httpx

        self.arm = arm
        self.timeout_sec = timeout_sec
        self.opens_think = False  # whether the chat template itself opens the think tag; see ``learn_template``
        self.cold_prompts = True  # no request finds its prompt in the prefix cache: every repeat starts alike
        self._http = httpx.AsyncClient(
            base_url=arm.url,
            headers=auth_headers(),
            timeout=httpx.Timeout(timeout_sec, connect=30),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # a proxy would be part of the measurement
        )

    async def __aenter__(self) -> ArmClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def learn_template(self, prompt_token_ids: list[int]) -> None:
        """See in a rendered prompt whether answers start inside the thinking."""
        text = await self.detokenize(prompt_token_ids[-8:]) if prompt_token_ids else None
        self.opens_think = bool(text and text.rstrip().endswith(THINK_OPEN))

    async def chat(
        self,
        messages: list[dict[str, str]],
        max_tokens: int,
        temperature: float | None,
        thinking_budget: int | None = None,
        seed: int | None = None,
    ) -> RequestResult:
        """Stream one answer; ``temperature`` None leaves sampling to the server's defaults. Never raises.

        With a ``thinking_budget``, thinking that is still open after so many tokens is closed by force (s1, arXiv
        2501.19393), and the answer has ``max_tokens`` of its own: what is missing of it is asked for in a second
        request, whose prompt holds the first's output. Without one ``max_tokens`` bounds both together.
        """
        body: dict[str, Any] = {
            "model": self.arm.model,
            "messages": messages,
            "max_tokens": thinking_budget or max_tokens,
            "return_token_ids": True,
        }
        if temperature is not None:
            body["temperature"] = temperature
        if seed is not None:
            body["seed"] = seed
        if self.arm.xargs:
            body["vllm_xargs"] = self.arm.xargs
        started = _Clocks()
        reader = StreamReader(self.opens_think)
        await self._guarded(reader, "/v1/chat/completions", body, started)
        result = reader.result
        if thinking_budget and not result.error and result.finish_reason == "length":
            await self._go_on(reader, body, max_tokens, started)
        result.clock_jump_sec = started.jump_sec()
        return result

    async def _go_on(self, reader: StreamReader, first: dict[str, Any], max_tokens: int, started: _Clocks) -> None:
        """The rest of the answer, after the thinking is closed."""
        result = reader.result
        closing = await self.tokenize(END_OF_THINKING) if reader.is_thinking else []
        if not result.token_ids or (reader.is_thinking and not closing):
            return reader.fail("malformed", "the server returns no token ids: a thinking budget can't be enforced")
        if reader.is_thinking:
            reader.close_thinking(END_OF_THINKING, closing)
        left = max_tokens - (len(result.token_ids) - result.num_think_tokens)
        if left < 1:
            return None
        body = {key: value for key, value in first.items() if key != "messages"}
        body |= {"prompt": [*result.prompt_token_ids, *result.token_ids, *closing], "max_tokens": left}
        await self._guarded(reader, "/v1/completions", body, started)
        return None

    async def _guarded(self, reader: StreamReader, path: str, body: dict[str, Any], started: _Clocks) -> None:
        import httpx

        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        if self.cold_prompts:
            body["cache_salt"] = uuid.uuid4().hex
        reader.expect_stream()
        try:
            async with asyncio.timeout(self.timeout_sec):
                await self._stream(path, body, reader, started)
        except (TimeoutError, httpx.TimeoutException) as error:
            reader.fail("timeout", f"{self.timeout_sec:g} s: {error}")
        except (httpx.TransportError, OSError) as error:
            reader.fail("disconnected", f"{type(error).__name__}: {error}")
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reader.fail("malformed", f"{type(error).__name__}: {error}")

    async def _stream(self, path: str, body: dict[str, Any], reader: StreamReader, started: _Clocks) -> None:
        async with self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return reader.fail(_status_kind(response.status_code), f"{response.status_code}: {text}")
            complete = False
            async for data in _events(response):
                now = started.elapsed_sec()
                if data == "[DONE]":
                    complete = True
                    continue  # to the end of the body: closing early would look like a client that went away
                chunk = json.loads(data)
                if "error" in chunk:
                    return reader.fail("stream_error", str(chunk["error"]))
                reader.take(chunk, now)
        reader.end(complete)

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
            found = {int(token.removeprefix("token_id:")): float(logprob) for token, logprob in top.items()}
        except (KeyError, IndexError, TypeError, AttributeError):
            found = {}
        if not found:
            raise ValueError(f"no log-probabilities in the answer of {self.arm.url}")
        return found

    async def detokenize(self, token_ids: int | list[int]) -> str | None:
        """Text of one token or several; None where the server can't tell."""
        tokens = [token_ids] if isinstance(token_ids, int) else token_ids
        answer = await self._ask("/detokenize", {"tokens": tokens})
        return None if answer is None else str(answer.get("prompt"))

    async def tokenize(self, text: str) -> list[int]:
        """Ids of ``text`` without added special tokens; empty where the server can't tell."""
        answer = await self._ask("/tokenize", {"prompt": text, "add_special_tokens": False})
        return list((answer or {}).get("tokens") or [])

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        import httpx

        try:
            response = await self._http.post(path, json={"model": self.arm.model, **body})
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

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


class _Clocks:
    """Durations come from the monotonic clock; the wall clock is watched, for logs and servers go by it."""

    def __init__(self) -> None:
        self._monotonic, self._wall = time.perf_counter(), time.time()

    def elapsed_sec(self) -> float:
        return time.perf_counter() - self._monotonic

    def jump_sec(self) -> float:
        """0 when both clocks agree about the time that has passed."""
        jump = (time.time() - self._wall) - self.elapsed_sec()
        return jump if abs(jump) >= MIN_CLOCK_JUMP_SEC else 0.0


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    events = EventReader()
    async for block in response.aiter_bytes():
        for event in events.take(block):
            yield event


def _status_kind(status: int) -> str:
    if status == 429:
        return "http_429"
    return "http_5xx" if status >= 500 else "http_4xx"
