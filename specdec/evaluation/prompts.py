"""Read the prompts of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

PROMPT_FIELDS = ("prompt", "problem", "question")


def load_prompts(path: Path, num_prompts: int) -> list[str]:
    """The first ``num_prompts`` prompts of a file: JSONL with a field ``prompt`` (or ``problem``, ``question``),
    else plain text with one prompt a line. Blank lines are skipped.

    Raises:
        ValueError: the file can't be read, is empty, or a line (named) is malformed.
    """
    if num_prompts < 1:
        raise ValueError(f"eval.num_prompts must be at least 1, got {num_prompts}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 may stand inside a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} holds no prompts: write one JSON object with a field 'prompt' a line")
    is_jsonl = path.suffix in (".jsonl", ".json", ".ndjson") or numbered[0][1].lstrip().startswith("{")
    chosen = numbered[:num_prompts]
    if not is_jsonl:
        return [line.strip() for _, line in chosen]
    return [_prompt_of(line, f"{path}, line {number}") for number, line in chosen]


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: wants an object with a field 'prompt', not {type(row).__name__}")
    for name in PROMPT_FIELDS:
        if name in row:
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{where}: field {name!r} must be a text that is not empty")
            return row[name]
    raise ValueError(f"{where}: no field {', '.join(map(repr, PROMPT_FIELDS))}; found {', '.join(row) or 'none'}")
