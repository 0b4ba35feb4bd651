"""What the chunks of a stream add up to: times, tokens, text, and where the thinking ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from specdec.evaluation.records import RequestResult
from specdec.traces import THINK_CLOSE, THINK_OPEN

ERROR_DETAIL_CHARS = 300


class EventReader:
    """Server-sent events out of blocks of bytes. Split at newlines only: a text line may hold U+2028, where httpx's
    own line reader splits as well."""

    def __init__(self) -> None:
        self._pending = b""

    def take(self, block: bytes) -> Iterator[str]:
        """The data of each event that ``block`` completes."""
        *lines, self._pending = (self._pending + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def texts_of(choice: dict[str, Any]) -> tuple[str, str]:
    """What one choice of a chunk adds: text that the server calls reasoning, and other text."""
    delta = choice.get("delta") or {"content": choice.get("text")}
    return delta.get("reasoning") or delta.get("reasoning_content") or "", delta.get("content") or ""


class StreamReader:
    """Fills a ``RequestResult`` from the chunks of one answer, which may come in two streams (a forced answer).

    Thinking is told by the server's own ``reasoning`` field, or by the think tags in the text. ``opens_think``: the
    prompt ends with the opening tag, so the text starts inside the thinking.
    """

    def __init__(self, opens_think: bool = False) -> None:
        self.result = RequestResult(text=THINK_OPEN if opens_think else "")  # as a checker must see it
        self._thinking = opens_think
        self._reasoning_field = False
        self._earlier_tokens = 0  # of the streams before this one
        self._finish_reason: str | None = None
        self._has_usage = False

    @property
    def is_thinking(self) -> bool:
        """Whether the thinking is open."""
        return self._thinking

    def expect_stream(self) -> None:
        """Another stream begins."""
        self._earlier_tokens = self.result.num_output_tokens or 0
        if self._earlier_tokens:
            self.result.forced_from = [len(self.result.drafted_per_step), self._earlier_tokens]
        self._finish_reason, self._has_usage = None, False

    def close_thinking(self, text: str, token_ids: list[int]) -> None:
        """The client closed the thinking with ``text``, these tokens; what follows is visible."""
        result = self.result
        result.text += text
        result.closing_token_ids = token_ids
        result.num_think_tokens = len(result.token_ids)
        self._thinking = False

    def take(self, chunk: dict[str, Any], now_sec: float) -> None:
        """Add one chunk that arrived ``now_sec`` after the request was sent."""
        result = self.result
        usage = chunk.get("usage")
        if usage:
            self._has_usage = True
            if result.num_prompt_tokens is None:
                result.num_prompt_tokens = usage.get("prompt_tokens")
            result.num_output_tokens = self._earlier_tokens + usage["completion_tokens"]
        steps = (chunk.get("metrics") or {}).get("speculative_decoding") or {}
        result.drafted_per_step += steps.get("per_step_drafted") or []
        result.accepted_per_step += steps.get("per_step_accepted") or []
        if not result.prompt_token_ids:
            result.prompt_token_ids = chunk.get("prompt_token_ids") or []
        for choice in chunk.get("choices") or []:
            self._take_choice(choice, now_sec)

    def _take_choice(self, choice: dict[str, Any], now_sec: float) -> None:
        result = self.result
        token_ids = choice.get("token_ids") or []
        finished = choice.get("finish_reason")
        reasoning, content = texts_of(choice)
        # The role chunk comes ahead of the first token and holds none: it does not stop the clock.
        if token_ids or finished or content or reasoning:
            if result.ttft_sec is None:
                result.ttft_sec = now_sec
            else:
                result.chunk_gaps_sec.append(now_sec - (result.e2e_sec or result.ttft_sec))
            result.e2e_sec = now_sec
        result.token_ids += token_ids
        self._take_text(reasoning, content, now_sec)
        self._finish_reason = finished or self._finish_reason
        result.finish_reason = self._finish_reason

    def _take_text(self, reasoning: str, content: str, now_sec: float) -> None:
        result = self.result
        if reasoning:
            if not self._thinking and not self._reasoning_field:
                result.text += THINK_OPEN  # the server's parser took it away; no checker may take this for the answer
            self._thinking = self._reasoning_field = True
            result.text += reasoning
        if content and self._reasoning_field and self._thinking:
            result.text += THINK_CLOSE
            self._thinking = False
        elif content and not self._reasoning_field:
            seen = result.text + content
            if THINK_CLOSE in seen:
                self._thinking = False
            elif seen.lstrip().startswith(THINK_OPEN):
                self._thinking = True
        result.text += content
        if self._thinking:
            result.num_think_tokens = len(result.token_ids)
        elif content and result.ttfvt_sec is None and self._has_visible_text():
            result.ttfvt_sec = now_sec

    def _has_visible_text(self) -> bool:
        text = self.result.text.rpartition(THINK_CLOSE)[2].strip()
        return bool(text) and not THINK_OPEN.startswith(text)  # a tag may come in pieces

    def fail(self, kind: str, detail: str) -> None:
        """Record the first thing that went wrong."""
        if self.result.error is None:
            self.result.error, self.result.error_detail = kind, detail[:ERROR_DETAIL_CHARS]

    def end(self, complete: bool) -> None:
        """The stream is over; ``complete``: the server said so."""
        result = self.result
        if not complete or self._finish_reason is None:
            self.fail("truncated", "the stream ended before the answer did")
        elif not self._has_usage:
            self.fail("missing_usage", "no usage in the stream: tokens can't be counted")
        pairs = itertools.zip_longest(result.drafted_per_step, result.accepted_per_step, fillvalue=-1)
        if any(not 0 <= num_accepted <= num_drafted for num_drafted, num_accepted in pairs):
            result.drafted_per_step, result.accepted_per_step = [], []
            self.fail("malformed", "the server's steps accept more tokens than they drafted")
