"""Finished requests kept as training rows, when the operator asks for it: what adapts a head to what it really serves.

A row is a line of JSON with the token ids of prompt and answer, in files that only their owner can read. The folder
never holds more than its bound: the oldest file goes first. Writing happens on a thread of its own; when the disk is
slower than the server, or full, rows are dropped and counted, and serving goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import queue
import random
import threading
from collections.abc import Sequence
from pathlib import Path

from specdec.manifest import TargetFingerprint
from specdec.record import write_json_atomic

logger = logging.getLogger("vllm.specdec")

TARGET_NAME = "target.json"  # whose requests these are
NUM_FILES = 16  # the bound is kept by dropping one of them
MAX_WAITING = 256  # rows


def claim(directory: Path, fingerprint: TargetFingerprint) -> None:
    """Note whose requests the folder holds: what one target wrote is no lesson for another's head.

    Raises:
        ValueError: another target's, or it can't be written.
    """
    path, ours = directory / TARGET_NAME, dataclasses.asdict(fingerprint)
    try:
        if not path.is_file():
            write_json_atomic(path, ours)
        elif json.loads(path.read_text()) != ours:
            raise ValueError(f"keep_traffic: {directory} holds requests of another target; name another folder")
    except OSError as error:
        raise ValueError(f"keep_traffic: cannot write to {directory}: {error.strerror}") from error


class TrafficLog:
    """Keeps a ``share`` of the finished requests in ``directory``, at most ``max_bytes`` of them."""

    def __init__(self, directory: Path, share: float, max_bytes: int, seed: int | None = None) -> None:
        """Raises:
        ValueError: a share outside 0 to 1, or a folder that can't be written.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"keep_share must be between 0 and 1, got {share}")
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ValueError(f"keep_traffic: cannot write to {directory}: {error.strerror}") from error
        self.directory, self.share, self.max_bytes = directory, share, max_bytes
        self.file_bytes = max(1, max_bytes // NUM_FILES)  # a longer row is not kept
        self.num_kept = self.num_dropped = 0
        self._end_torn_line()
        self._random = random.Random(seed)
        self._rows: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write, name="specdec-traffic", daemon=True)
        self._thread.start()

    def finished(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        """Perhaps keep this request; returns at once."""
        if not completion_ids or self._random.random() >= self.share:
            return
        row = json.dumps({"prompt_ids": list(prompt_ids), "completion_ids": list(completion_ids)}) + "\n"
        try:
            if len(row) > self.file_bytes:
                raise queue.Full
            self._rows.put_nowait(row)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what waits, and end."""
        self._rows.put(None)
        self._thread.join()

    def files(self) -> list[Path]:
        """The oldest first."""
        return sorted(self.directory.glob("served-*.jsonl"))

    def _write(self) -> None:
        while (row := self._rows.get()) is not None:
            try:
                self._append(row)
                self.num_kept += 1
            except OSError as error:
                if not self.num_dropped:
                    logger.error("specdec: a served request was not kept: %s", error)
                self.num_dropped += 1

    def _end_torn_line(self) -> None:
        """What a killed server left half written must not swallow the next row."""
        for path in self.files()[-1:]:
            with contextlib.suppress(OSError), path.open("rb+") as lines:
                lines.seek(-1, os.SEEK_END)  # an empty file has no last byte: an OSError
                if lines.read() != b"\n":
                    lines.write(b"\n")

    def _append(self, row: str) -> None:
        files = self.files()
        if not files or files[-1].stat().st_size + len(row) > self.file_bytes:
            number = int(files[-1].stem.rpartition("-")[2]) + 1 if files else 0
            self._make_room(files)
            files.append(self.directory / f"served-{number:08d}.jsonl")
        descriptor = os.open(files[-1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a") as lines:
            lines.write(row)

    def _make_room(self, files: list[Path]) -> None:
        """Drop the oldest, until another file fits: they may be of a server that was allowed more."""
        sizes = {path: path.stat().st_size for path in files}
        for old in files:
            if len(sizes) < NUM_FILES and sum(sizes.values()) + self.file_bytes <= self.max_bytes:
                return
            sizes.pop(old)
            old.unlink(missing_ok=True)
