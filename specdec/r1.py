"""The R1-Distill family: how one of its models is told, and the chat template that training and serving share."""

from __future__ import annotations

import functools
import re
from pathlib import Path

TEMPLATE_PATH = Path(__file__).with_name("templates") / "r1_distill.jinja"
_NAME = re.compile(r"r1[-_.]?distill", re.IGNORECASE)
_TURNS = ("<｜User｜>", "<｜Assistant｜>", "</think>")  # all three are in every published revision


def is_r1_name(name: str) -> bool:
    """Whether a Hugging Face id or a directory is called one of the family."""
    return _NAME.search(Path(name).name) is not None


def has_r1_turns(chat_template: str | None) -> bool:
    """Whether a chat template writes the family's turns, in whatever revision."""
    return chat_template is not None and all(mark in chat_template for mark in _TURNS)


@functools.cache
def template() -> str:
    """The template's text."""
    return TEMPLATE_PATH.read_text(encoding="utf-8")
