"""Tells thinking from answer while the text of one reply is still arriving, in whatever pieces."""

from __future__ import annotations

from typing import NamedTuple

from specdec.traces import THINK_CLOSE, THINK_OPEN

THINKING, ANSWER = "thinking", "answer"
WAS_THINKING = "was thinking"  # a piece without text: all that came as answer so far was thinking
_START, _PARSED = "start", "parsed"


class Piece(NamedTuple):
    """A stretch of text of one kind: THINKING, ANSWER or WAS_THINKING."""

    kind: str
    text: str


class ThinkSplitter:
    """Splits one reply. Thinking is what the server sends as reasoning, or what the think tags enclose.

    ``opens_think``: whether the prompt itself ends with the opening tag, so that only the closing one appears; None:
    nobody knows. Then text counts as answer until a closing tag shows that it was thinking, unless ``patient``:
    text is held back until that is settled.
    """

    def __init__(self, opens_think: bool | None, patient: bool = False) -> None:
        self._opens_think = opens_think
        self._patient = patient
        self._state = _START  # _START | THINKING | ANSWER | _PARSED: the server tells the kinds apart
        self._may_close = opens_think is not False  # whether a closing tag would be one, and not a mention of it
        self._held = ""  # undecided: it may be the beginning of a tag
        self._texts = {THINKING: "", ANSWER: ""}

    @property
    def thinking(self) -> str:
        """The thinking so far, without tags."""
        return self._texts[THINKING]

    @property
    def answer(self) -> str:
        """The answer so far, with the line breaks that it starts with."""
        return self._texts[ANSWER]

    def take(self, reasoning: str, content: str) -> list[Piece]:
        """Add what one chunk holds. Returns what can be shown now."""
        pieces: list[Piece] = []
        if reasoning:
            self._state = _PARSED
            pieces += self._emit(THINKING, reasoning)
        if content:
            text, self._held = self._held + content, ""
            pieces += self._emit(ANSWER, text) if self._state == _PARSED else self._split(text)
        return pieces

    def finish(self) -> list[Piece]:
        """The reply is over: what was held back is no tag."""
        text, self._held = self._held, ""
        thinks = self._state == THINKING or (self._state == _START and self._opens_think)
        return self._emit(THINKING if thinks else ANSWER, text)

    def _split(self, text: str) -> list[Piece]:
        if self._state == _START:
            start = text.lstrip()
            if THINK_OPEN.startswith(start) and start != THINK_OPEN:
                self._held = text
                return []
            is_opened = start.startswith(THINK_OPEN)
            self._state = THINKING if is_opened or self._opens_think else ANSWER
            self._may_close = self._may_close or is_opened
            text = start.removeprefix(THINK_OPEN) if is_opened else text
        if not self._may_close:
            return self._emit(ANSWER, text)
        before, tag, after = text.partition(THINK_CLOSE)
        if tag:
            return self._close(before) + self._emit(ANSWER, after)
        if self._state == ANSWER and self._patient:
            self._held = text
            return []
        num_held = _num_begun(text, THINK_CLOSE)
        self._held = text[len(text) - num_held :]
        return self._emit(self._state, text[: len(text) - num_held])

    def _close(self, before: str) -> list[Piece]:
        """``before`` is the last of the thinking."""
        came_as_answer = self._state == ANSWER and not self._patient
        self._state, self._may_close = ANSWER, False
        if not came_as_answer:
            return self._emit(THINKING, before)
        pieces = self._emit(ANSWER, before)
        self._texts = {THINKING: self.answer, ANSWER: ""}
        return [*pieces, Piece(WAS_THINKING, "")]

    def _emit(self, kind: str, text: str) -> list[Piece]:
        self._texts[kind] += text
        return [Piece(kind, text)] if text else []


def _num_begun(text: str, tag: str) -> int:
    """Number of characters at the end of ``text`` that ``tag`` could go on from."""
    longest = min(len(tag) - 1, len(text))
    return next((count for count in range(longest, 0, -1) if text.endswith(tag[:count])), 0)
