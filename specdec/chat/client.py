"""The HTTP side of a chat: one server, its model, its streams. Every failure is one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any

import httpx

from specdec.evaluation.stream import EventReader
from specdec.traces import THINK_OPEN

CONNECT_TIMEOUT_SEC = 10.0
SILENCE_TIMEOUT_SEC = 900.0  # a queued request may wait long for its first token
MESSAGE_CHARS = 300
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ChatError(ValueError):
    """An answer that did not come, in words for the user."""


class ChatClient:
    """Talks to the server at ``url``, given with or without ``/v1``. Use as a context manager."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ChatError(f"{url!r} is no URL ({error}); want one like http://127.0.0.1:8000") from error
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(SILENCE_TIMEOUT_SEC, connect=CONNECT_TIMEOUT_SEC),
            trust_env=host not in LOOPBACK,  # no proxy leads to this machine
        )
        self._has_status = True

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The first model that the server lists.

        Raises:
            ChatError: the server isn't there, refuses, or lists none.
        """
        try:
            response = self._http.get(f"{self.url}/v1/models", timeout=CONNECT_TIMEOUT_SEC)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ChatError(f"{self.url} lists no model at /v1/models: pass --model, or check --url") from error

    def opens_think(self, model: str) -> bool | None:
        """Whether the chat template opens the think tag itself; None where the server does not show it."""
        question = {"model": model, "messages": [{"role": "user", "content": "?"}]}
        tokens = self._ask("POST", "/tokenize", question).get("tokens")
        if not isinstance(tokens, list) or not tokens:
            return None
        text = self._ask("POST", "/detokenize", {"model": model, "tokens": tokens[-8:]}).get("prompt")
        return text.rstrip().endswith(THINK_OPEN) if isinstance(text, str) else None

    def served_acceptance_length(self) -> float | None:
        """The acceptance length of the server's last drafts; None where it has no such figure."""
        if not self._has_status:
            return None
        status = self._ask("GET", "/specdec/status")
        self._has_status = bool(status)
        length = status.get("acceptance_length")
        return float(length) if isinstance(length, int | float) else None

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The chunks of one chat completion, as they come.

        Raises:
            ChatError: the server isn't there, refuses, reports an error, or the stream ends before the answer does.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True, **body.get("stream_options", {})}}
        is_complete = has_begun = False
        try:
            with self._http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                has_begun = True
                events = EventReader()
                for data in (event for block in response.iter_bytes() for event in events.take(block)):
                    if data == "[DONE]":
                        is_complete = True
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ChatError(f"the server broke off: {_message(chunk)}")
                    is_complete = is_complete or any(choice.get("finish_reason") for choice in chunk.get("choices", []))
                    yield chunk
        except httpx.HTTPError as error:
            raise _cut(error) if has_begun else self._unreachable(error) from error
        except ChatError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise ChatError(f"{self.url} sent something else than a chat completion: {error}") from error
        if not is_complete:
            raise _cut(None)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object at ``path``; empty where there is none."""
        try:
            response = self._http.request(method, f"{self.url}{path}", json=body, timeout=CONNECT_TIMEOUT_SEC)
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def _unreachable(self, error: Exception) -> ChatError:
        return ChatError(
            f"no answer from {self.url} ({error or type(error).__name__}): is it running? "
            "Start one with `specdec serve`, or pass another --url"
        )


def _refusal(response: httpx.Response) -> ChatError:
    try:
        text = _message(response.json())
    except ValueError:
        text = response.text
    hint = "; pass --api-key or set OPENAI_API_KEY" if response.status_code == 401 else ""
    text = " ".join(text.split())[:MESSAGE_CHARS] or response.reason_phrase
    return ChatError(f"the server says {response.status_code}: {text}{hint}")


def _message(answer: Any) -> str:
    """The server's own words, in the places where servers put them."""
    while isinstance(answer, dict):
        answer = next((answer[key] for key in ("error", "message", "detail") if answer.get(key)), str(answer))
    return str(answer)


def _cut(error: Exception | None) -> ChatError:
    why = f" ({error})" if error else ""
    return ChatError(f"the connection was cut before the answer was complete{why}; ask again")
