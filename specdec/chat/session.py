"""The conversation: reads prompts, keeps the history, shows the replies."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from specdec.chat.client import ChatClient, ChatError
from specdec.chat.reply import Reply, figures_line
from specdec.chat.views import PlainView, TerminalView, View

PROMPT = "> "
HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """What the command line says. None: the server's own default."""

    url: str
    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    api_key: str | None = None
    no_color: bool = False


class Conversation:
    """The turns so far, and how the next one is asked."""

    def __init__(self, client: ChatClient, options: ChatOptions, model: str, view: View) -> None:
        self._client, self._view = client, view
        self._opens_think = client.opens_think(model)
        given: dict[str, Any] = {"model": model, "temperature": options.temperature, "max_tokens": options.max_tokens}
        self._settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if self._opens_think is not None:  # it is vLLM, and counts as it goes when asked to
            self._settings["stream_options"] = {"continuous_usage_stats": True}
        self._system = [{"role": "system", "content": options.system}] if options.system else []
        self._turns: list[dict[str, str]] = []

    def start_over(self) -> None:
        """Forget every turn."""
        self._turns = []

    def ask(self, prompt: str) -> None:
        """Stream the reply to ``prompt``; Ctrl-C stops it. Only a turn with an answer becomes part of the history,
        and only its answer: a reasoning model does not want its old thinking back.

        Raises:
            ChatError: the reply did not come, or not to its end.
        """
        turn = {"role": "user", "content": prompt}
        reply = Reply(self._opens_think, self._view.patient)
        is_stopped = False
        try:
            self._receive(reply, {**self._settings, "messages": [*self._system, *self._turns, turn]})
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            for piece in reply.finish():
                self._view.show(piece)
            self._view.end_reply()
        served = None if is_stopped or reply.acceptance_length else self._client.served_acceptance_length()
        self._view.note(figures_line(reply, served, is_stopped))
        if reply.answer.strip():
            self._turns += [turn, {"role": "assistant", "content": reply.answer}]
        else:
            self._view.note("no answer: this turn is left out of the conversation")

    def _receive(self, reply: Reply, body: dict[str, Any]) -> None:
        with contextlib.closing(self._client.stream(body)) as chunks:
            for chunk in chunks:
                for piece in reply.take(chunk):
                    self._view.show(piece)
                if reply.tok_per_sec is not None:
                    self._view.speed(reply.tok_per_sec)


def run_chat(options: ChatOptions) -> None:
    """Chat until the input ends, ``/quit``, or Ctrl-C at the prompt.

    Raises:
        ChatError: the server can't be used; without a terminal also when any reply fails.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    view: View = TerminalView(options.no_color) if is_terminal else PlainView()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing
    try:
        with ChatClient(options.url, options.api_key) as client:
            model = options.model or client.first_model()
            conversation = Conversation(client, options, model, view)
            if is_terminal:
                view.note(f"{model} at {client.url}: {HELP}")
            while _take_turn(conversation, view, is_terminal):
                pass
    except (KeyboardInterrupt, EOFError):
        if is_terminal:
            view.note("")
    except BrokenPipeError:  # the reader of our output has gone; nothing may be flushed to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _take_turn(conversation: Conversation, view: View, is_terminal: bool) -> bool:
    """One line of input; False when it ends the chat."""
    line = _read_line(is_terminal).strip()
    if line == "/quit":
        return False
    if line == "/new":
        conversation.start_over()
    elif re.fullmatch(r"/[a-z]+", line):
        view.note(HELP if line == "/help" else f"unknown command {line}: {HELP}")
    elif line:
        try:
            conversation.ask(line)
        except ChatError as error:
            if not is_terminal:
                raise
            view.note(f"error: {error}")
    return True


def _read_line(is_terminal: bool) -> str:
    if is_terminal:
        return input(PROMPT)
    if sys.stdin.isatty():
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
