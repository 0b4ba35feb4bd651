"""Requests that a server of the target has answered (``serve.keep_traffic``) as training rows.

A line holds the ids of prompt and completion as they were served, so the rows are the target's own, token for token.
The folder may be that of a server that runs, or was killed: what is not a whole row is dropped and counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draft_training.drops import Drops
from specdec.record import text_sha256
from specdec.targets import Target
from specdec.traces import THINK_OPEN, TokenRow, prompt_ids, render_prompt, row_from_ids

TARGET_NAME = "target.json"  # the fingerprint of the target that served
PROBE = "specdec"


def check_served(directory: Path, target: Target) -> None:
    """Refuse a folder that the target did not write.

    Raises:
        ValueError: no folder of ``serve.keep_traffic``, or another target's.
    """
    try:
        written_by = json.loads((directory / TARGET_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory} holds no {TARGET_NAME} ({error}): give the folder that a server filled with "
            "--set serve.keep_traffic=DIR"
        ) from error
    if written_by != dataclasses.asdict(target.fingerprint()):
        raise ValueError(f"{directory} was kept by a server of another target than {target.name}")


def served_rows(directory: Path, target: Target, tokenizer: Any, drops: Drops) -> Iterator[tuple[str, str, TokenRow]]:
    """Where each row stands, its conversation's first message, and the row, whose conversation id that message makes.

    The row's ``prompt`` is the user's message where the chat template makes of it exactly what was served, else empty.
    """
    turns = FirstTurn(tokenizer)
    seen: set[str] = set()
    vocab_size = int(target.config["vocab_size"])
    for where, line in _lines(directory):
        drops.num_seen += 1
        ids = _ids(line, vocab_size)
        if ids is None:
            drops.add("no whole row of token ids in the target's vocabulary", where)
            continue
        digest = text_sha256(json.dumps(ids))
        if digest in seen:
            drops.add("the same as an earlier row", where)
            continue
        seen.add(digest)
        message = turns.message(ids[0])
        row = row_from_ids(tokenizer, message, *ids)
        prompt = message if prompt_ids(tokenizer, message) == ids[0] else ""
        yield where, message, dataclasses.replace(row, prompt=prompt)


def _lines(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.glob("served-*.jsonl")):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # the server keeps its bound by dropping the oldest
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            yield f"{path.name} line {number}", line


def _ids(line: str, vocab_size: int) -> tuple[list[int], list[int]] | None:
    """Of prompt and completion; None when the line is torn or holds something else."""
    try:
        row = json.loads(line)
        found = row["prompt_ids"], row["completion_ids"]
    except (ValueError, KeyError, TypeError):
        return None
    valid = all(
        isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < vocab_size for i in ids) for ids in found
    )
    return found if valid else None


class FirstTurn:
    """Finds the user's first message in a rendered prompt: what all requests of one conversation begin with."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before, _, after = render_prompt(tokenizer, PROBE).partition(PROBE)
        # Earlier turns of a conversation open without the tag that makes the target think.
        self._after = after.split(THINK_OPEN)[0]

    def message(self, ids: list[int]) -> str:
        """The message; with a system prompt, or another template, all that stands in front of the first answer."""
        text = self._tokenizer.decode(ids)
        first = text.split(self._after)[0] if self._after.strip() else text
        return first.removeprefix(self._before)
