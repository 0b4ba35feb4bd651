"""Processes that take turns on one machine: one runs, the others are stopped, so noise falls on all of them alike.

Each process writes a line a training step; only the part of a step in which its process ran counts as its time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from specdec.progress import progress_bar

POLL_SEC = 0.1
LOG_LINES = 15  # of a failed side's log that are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A training step by the clock that all processes share."""

    begin: float
    end: float
    tokens: int  # real ones, without padding


@dataclass(kw_only=True)
class Side:
    """One training process: its command, with ``MARKS`` where the file of its steps is wanted."""

    name: str
    command: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    ran: list[tuple[float, float]] = field(default_factory=list)
    exit_code: int | None = None
    peak_memory_bytes: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _resumed: float | None = None

    @property
    def marks(self) -> Path:
        return self.folder / "steps.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self.exit_code is None

    def start(self) -> None:
        """Start from nothing. It dies with this process, also when it is stopped then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.marks.unlink(missing_ok=True)
        command = [str(self.marks) if word == "MARKS" else word for word in self.command]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self._resumed = time.monotonic()

    def run_for(self, seconds: float) -> None:
        """Let it run; returns earlier when it ends."""
        if self._resumed is None:
            self._resumed = time.monotonic()
            self._signal(signal.SIGCONT)
        deadline = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < deadline:
            self._note_memory()
            time.sleep(POLL_SEC)

    def pause(self) -> None:
        if self.is_alive and self._resumed is not None:
            self._signal(signal.SIGSTOP)
            self._note_pause()

    def end(self) -> None:
        if self.is_alive and self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self.has_ended()

    def has_ended(self) -> bool:
        if self.exit_code is None and self._process is not None and self._process.poll() is not None:
            self._note_pause()
            self.exit_code = self._process.returncode
        return self.exit_code is not None

    def _signal(self, number: int) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def _note_memory(self) -> None:
        """The peak so far. Not from ``wait4``: its figure also holds that of the process which started this one."""
        if self._process is not None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
                line = next(line for line in lines if line.startswith("VmHWM:"))
                self.peak_memory_bytes = max(self.peak_memory_bytes, int(line.split()[1]) * 1024)

    def _note_pause(self) -> None:
        if self._resumed is not None:
            self.ran.append((self._resumed, time.monotonic()))
            self._resumed = None

    @property
    def process_sec(self) -> float:
        """Time that it ran: start, features, validation and checkpoints included."""
        return sum(end - begin for begin, end in self.ran)

    def steps(self) -> list[tuple[float, int]]:
        """(seconds that it ran, tokens) of each step so far."""
        lines = self.marks.read_text().splitlines() if self.marks.is_file() else []
        steps = [Step(**json.loads(line)) for line in lines if line.endswith("}")]
        ran = [*self.ran, *([(self._resumed, time.monotonic())] if self._resumed is not None else [])]
        return [(overlap_sec(step, ran), step.tokens) for step in steps]

    @property
    def trained_sec(self) -> float:
        """Time that it spent in training steps."""
        return sum(seconds for seconds, _ in self.steps())


def overlap_sec(step: Step, ran: list[tuple[float, float]]) -> float:
    """The part of a step that lies in intervals in which its process ran."""
    return sum(max(0.0, min(step.end, end) - max(step.begin, begin)) for begin, end in ran)


def take_turns(
    sides: list[Side], turn_sec: float, planned_sec: float, label: str, enough: Callable[[Side], bool] | None = None
) -> None:
    """Run all sides in turn, each to its end or until it is ``enough``; ``planned_sec`` of training are foreseen.

    Raises:
        ValueError: a side failed; says where its log is and how it ends.
    """
    with _ended(sides), progress_bar(label, round(planned_sec * len(sides))) as advance:
        for side in sides:
            side.start()
            while not side.steps() and not side.has_ended():
                side.run_for(POLL_SEC)
            _pause(side)
        shown = 0
        while waiting := [side for side in sides if side.is_alive]:
            for side in waiting:
                side.run_for(turn_sec)
                _pause(side)
                if enough and enough(side):
                    side.end()
                trained = round(sum(min(planned_sec, each.trained_sec) for each in sides))
                advance(trained - shown, f"seconds of training, now {side.name}")
                shown = trained


def _pause(side: Side) -> None:
    side.pause()
    if side.exit_code:
        lines = side.log.read_text(errors="replace").splitlines()
        raise ValueError("\n".join([f"{side.name} failed; the end of its log {side.log}:", *lines[-LOG_LINES:]]))


@contextlib.contextmanager
def _ended(sides: list[Side]) -> Iterator[None]:
    try:
        yield
    finally:
        for side in sides:
            side.end()
