"""The target's completions as they come in: one line each, on disk at once, none twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.config import TracesConfig
from specdec.progress import progress_bar
from specdec.record import text_sha256
from specdec.targets import Target

Requests = dict[str, list[int]]  # prompt -> ids of its generation prompt


def sampling_of(target: Target, traces: TracesConfig) -> tuple[float, float]:
    """Temperature and top_p of the completions: the settings', else the target's own."""
    temperature = target.sampling.get("temperature", 1.0) if traces.temperature is None else traces.temperature
    top_p = target.sampling.get("top_p", 1.0) if traces.top_p is None else traces.top_p
    return temperature, 1.0 if temperature == 0 else top_p


def load_completions(path: Path) -> dict[str, dict[str, Any]]:
    """Finished completions by conversation id. A torn last line, left by a kill, is cut off the file."""
    finished: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return finished
    intact_bytes = 0
    with path.open("rb") as file:
        for line in file:
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                break
            finished[item["conversation_id"]] = item
            intact_bytes += len(line)
    if intact_bytes < path.stat().st_size:
        os.truncate(path, intact_bytes)
    return finished


class CompletionLog:
    """Finished completions, earlier runs' included, and the file that keeps them.

    A line holds ``conversation_id, prompt, prompt_ids, completion_ids, finish_reason``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.finished = load_completions(path)

    def missing(self, requests: Requests) -> Requests:
        return {prompt: ids for prompt, ids in requests.items() if text_sha256(prompt) not in self.finished}

    @contextmanager
    def writing(self, num_missing: int) -> Iterator[CompletionWriter]:
        with self._path.open("a", encoding="utf-8") as file, progress_bar("generating", num_missing) as advance:
            yield CompletionWriter(self.finished, file, advance)


class CompletionWriter:
    """Adds completions to the log and shows how fast they come."""

    def __init__(self, finished: dict[str, dict[str, Any]], file: Any, advance: Any) -> None:
        self._finished, self._file, self._advance = finished, file, advance
        self._num_tokens, self._started = 0, time.monotonic()

    def add(self, prompt: str, prompt_ids: list[int], completion_ids: list[int], finish_reason: str | None) -> None:
        item = {
            "conversation_id": text_sha256(prompt),
            "prompt": prompt,
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "finish_reason": finish_reason,
        }
        self._file.write(json.dumps(item) + "\n")
        self._file.flush()
        self._finished[item["conversation_id"]] = item  # type: ignore[index]
        self._num_tokens += len(completion_ids)
        self._advance(1, f"{self._num_tokens / (time.monotonic() - self._started):.0f} tok/s")
