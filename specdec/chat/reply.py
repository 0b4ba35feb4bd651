"""One reply while it arrives: its text, its times, and the line of figures that is shown below it."""

from __future__ import annotations

import time
from typing import Any

from specdec import metrics
from specdec.chat.client import ChatError
from specdec.chat.thinking import ANSWER, WAS_THINKING, Piece, ThinkSplitter
from specdec.evaluation.records import RequestResult
from specdec.evaluation.stream import StreamReader, texts_of
from specdec.metrics import AcceptanceCounts


class Reply:
    """Made when the request is sent; then fed with the chunks of its stream."""

    def __init__(self, opens_think: bool | None, patient: bool) -> None:
        self._started = time.perf_counter()
        self._reader = StreamReader(bool(opens_think))
        self._splitter = ThinkSplitter(opens_think, patient)
        self._thinking_end_sec: float | None = None
        self._acceptance = AcceptanceCounts()

    @property
    def result(self) -> RequestResult:
        """Times and the server's token counts."""
        return self._reader.result

    @property
    def answer(self) -> str:
        """The answer without its thinking, otherwise as the server sent it."""
        return self._splitter.answer

    @property
    def thinking_sec(self) -> float | None:
        """Seconds from the first token to the end of the thinking; None for a reply without."""
        result = self.result
        if not self._splitter.thinking.strip() or result.ttft_sec is None:
            return None
        end = self._thinking_end_sec if self._thinking_end_sec is not None else result.e2e_sec
        return (end or result.ttft_sec) - result.ttft_sec

    @property
    def acceptance_length(self) -> float | None:
        """Of this reply, as vLLM reports it with ``--per-request-spec-decode-metrics``; None where it does not."""
        return self._acceptance.acceptance_length

    @property
    def tok_per_sec(self) -> float | None:
        """So far, from its request on; None where the server does not count as it goes."""
        return metrics.tokens_per_sec(self.result.num_output_tokens or 0, self.result.e2e_sec or 0.0) or None

    def take(self, chunk: dict[str, Any]) -> list[Piece]:
        """Add a chunk that has just come. Returns what can be shown now.

        Raises:
            ChatError: it isn't one of a chat completion.
        """
        now_sec = time.perf_counter() - self._started
        pieces: list[Piece] = []
        try:
            self._reader.take(chunk, now_sec)
            steps = (chunk.get("metrics") or {}).get("speculative_decoding") or {}
            self._acceptance.num_drafts += steps.get("num_spec_steps", 0)
            self._acceptance.num_accepted_tokens += steps.get("num_accepted_draft_tokens", 0)
            for choice in chunk.get("choices") or []:
                pieces += self._splitter.take(*texts_of(choice))
        except (KeyError, TypeError, AttributeError) as error:
            raise ChatError(f"the server sent something else than a chat completion: {error!r}") from error
        self._mark(pieces, now_sec)
        return pieces

    def finish(self) -> list[Piece]:
        """The stream is over. Returns what was held back."""
        pieces = self._splitter.finish()
        self._mark(pieces, self.result.e2e_sec or 0.0)
        return pieces

    def _mark(self, pieces: list[Piece], now_sec: float) -> None:
        is_first = self._thinking_end_sec is None
        for kind, text in pieces:
            if kind == WAS_THINKING or (kind == ANSWER and is_first and text.strip()):
                self._thinking_end_sec = now_sec


def figures_line(reply: Reply, served_acceptance_length: float | None, stopped: bool = False) -> str:
    """Tokens, tokens per second, TTFT, time of thinking, τ: those that are known.

    ``served_acceptance_length``: the server's over its last drafts, for where the reply's own isn't known.
    """
    result = reply.result
    parts = ["stopped"] if stopped else []
    if result.num_output_tokens is not None:
        parts.append(f"{result.num_output_tokens} tokens")
        parts += [f"{reply.tok_per_sec:.1f} tokens/s"] if reply.tok_per_sec is not None else []
    if result.ttft_sec is not None:
        parts.append(f"TTFT {result.ttft_sec:.2f} s")
    if reply.thinking_sec is not None:
        parts.append(f"thinking {reply.thinking_sec:.1f} s")
    if reply.acceptance_length is not None:
        parts.append(f"τ {reply.acceptance_length:.2f}")
    elif served_acceptance_length is not None:
        parts.append(f"τ {served_acceptance_length:.2f} (of the server)")
    if result.finish_reason == "length":
        parts.append("cut off at the length limit")
    return " · ".join(parts)
