"""Where a chat is shown: in a terminal, or plainly, the answer on standard output and the rest on standard error."""

from __future__ import annotations

import os
import sys
from typing import Protocol, TextIO

from rich.console import Console

from specdec.chat.thinking import ANSWER, THINKING, WAS_THINKING, Piece

DIM = "dim"
# What a model writes must not steer the terminal: control characters go, line breaks and tabs stay.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class View(Protocol):
    """What the conversation asks of a place to show it in."""

    patient: bool  # text is better shown late than as the wrong kind

    def show(self, piece: Piece) -> None:
        """A piece of the current reply."""

    def speed(self, tok_per_sec: float) -> None:
        """How fast the reply comes, so far."""

    def end_reply(self) -> None:
        """The reply is over, complete or not."""

    def note(self, text: str) -> None:
        """A line about the chat itself."""


class _Lines:
    """One kind's text on its way out: leading blank lines dropped, and whether a line is open is known."""

    def __init__(self) -> None:
        self.has_begun = self.is_open = False

    def clean(self, text: str) -> str:
        text = text if self.has_begun else text.lstrip()
        if text:
            self.has_begun, self.is_open = True, not text.endswith("\n")
        return text


class PlainView:
    """For pipes and files."""

    patient = True

    def __init__(self) -> None:
        self._lines = {THINKING: _Lines(), ANSWER: _Lines()}

    def show(self, piece: Piece) -> None:
        text = self._lines[piece.kind].clean(piece.text)
        if piece.kind == ANSWER and text:
            self._end_line(THINKING, sys.stderr)
        _write(sys.stdout if piece.kind == ANSWER else sys.stderr, text)

    def speed(self, tok_per_sec: float) -> None:
        pass  # it has no place that can change

    def end_reply(self) -> None:
        self._end_line(THINKING, sys.stderr)
        self._end_line(ANSWER, sys.stdout)
        self._lines = {THINKING: _Lines(), ANSWER: _Lines()}

    def note(self, text: str) -> None:
        _write(sys.stderr, f"{text}\n")

    def _end_line(self, kind: str, stream: TextIO) -> None:
        if self._lines[kind].is_open:
            self._lines[kind].is_open = False
            _write(stream, "\n")


class TerminalView:
    """For people: thinking dim, or between words where there is no style."""

    patient = False

    def __init__(self, no_color: bool) -> None:
        is_bare = no_color or "NO_COLOR" in os.environ
        self._console = Console(color_system=None if is_bare else "auto", highlight=False)
        self._kind: str | None = None
        self._lines = _Lines()

    def show(self, piece: Piece) -> None:
        if piece.kind == WAS_THINKING:
            self._end_line()
            self.note("(all of this was thinking)")
            self._kind, self._lines = None, _Lines()
            return
        if piece.kind != self._kind:
            if self._kind is not None and not piece.text.strip():
                return  # the blank lines behind the thinking
            self._change_to(piece.kind)
        text = self._lines.clean(piece.text.translate(_CONTROLS))
        self._console.out(text, style=DIM if piece.kind == THINKING else None, end="")

    def speed(self, tok_per_sec: float) -> None:
        if self._console.color_system is not None:  # a terminal without colours may not know titles either
            self._console.set_window_title(f"{tok_per_sec:.0f} tokens/s")

    def end_reply(self) -> None:
        self._end_line()
        self._kind, self._lines = None, _Lines()

    def note(self, text: str) -> None:
        self._console.out(text.translate(_CONTROLS), style=DIM)

    def _change_to(self, kind: str) -> None:
        self._end_line()
        has_style = self._console.color_system is not None
        if self._kind is not None:
            self._console.out("" if has_style else "[answer]")
        elif kind == THINKING and not has_style:
            self._console.out("[thinking]")
        self._kind, self._lines = kind, _Lines()

    def _end_line(self) -> None:
        if self._lines.is_open:
            self._lines.is_open = False
            self._console.out("")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
