"""What was measured so far, line by line on disk: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from specdec.evaluation.records import BlockRun

NAME = "journal.jsonl"


class Journal:
    """Block runs of one measurement. A file that belongs to another measurement is refused, never overwritten."""

    def __init__(self, directory: Path, plan_sha256: str) -> None:
        """Open or create the journal.

        Raises:
            ValueError: the directory holds the journal of a run with other settings.
        """
        self.path = directory / NAME
        self.runs: list[BlockRun] = []
        directory.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._load(plan_sha256)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size == 0:
            self._write({"plan_sha256": plan_sha256})

    def _load(self, plan_sha256: str) -> None:
        intact_bytes, same_plan = 0, False
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    tree = json.loads(line) if line.endswith(b"\n") else None
                except json.JSONDecodeError:
                    tree = None
                if tree is None:  # torn by a kill: what is behind it is not trusted either
                    break
                if number == 0:
                    same_plan = tree.get("plan_sha256") == plan_sha256
                elif not same_plan:
                    raise ValueError(
                        f"{self.path.parent} holds an interrupted run with other settings: repeat its command to "
                        f"finish it, choose another --out, or delete {self.path}"
                    )
                else:
                    self.runs.append(BlockRun.from_dict(tree))
                intact_bytes += len(line)
        os.truncate(self.path, intact_bytes if same_plan else 0)  # a run that measured nothing yet holds up nobody

    @property
    def done(self) -> set[tuple[str, int, int, str]]:
        """``(cell, repeat, block, arm)`` of what need not be measured again."""
        return {(run.cell, run.repeat, run.block, run.arm) for run in self.runs}

    def add(self, run: BlockRun) -> None:
        """Keep one more; on disk when this returns."""
        self.runs.append(run)
        self._write(run.to_dict())

    def _write(self, tree: object) -> None:
        self._file.write(json.dumps(tree) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more is measured; the file stays."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file: the result holds it all."""
        self.path.unlink(missing_ok=True)
