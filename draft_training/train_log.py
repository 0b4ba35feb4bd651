"""``train_log.jsonl``: one line a step, each step once however often the run was stopped; TensorBoard on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_NAME = "train_log.jsonl"


class TrainLog:
    """Appends one line a step; what a killed run wrote after its last checkpoint is cut off first.

    Raises:
        ValueError: TensorBoard events are asked for and can't be written here.
    """

    def __init__(self, work_dir: Path, num_steps_done: int, tensorboard: bool) -> None:
        path = work_dir / LOG_NAME
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= num_steps_done]
        work_dir.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept))
        self._file = path.open("a")
        self._writer = _tensorboard_writer(work_dir, num_steps_done) if tensorboard else None

    def write(self, step: int, **figures: Any) -> None:
        """Add the figures of ``step``; lists are for the file alone."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]


def require_tensorboard() -> Any:
    """``torch.utils.tensorboard.SummaryWriter``.

    Raises:
        ValueError: the tensorboard package is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "train.tensorboard needs the tensorboard package: pip install 'specdec[train-logs]', or leave it off; "
            f"{LOG_NAME} holds the same figures"
        ) from error
    return SummaryWriter


def _tensorboard_writer(work_dir: Path, num_steps_done: int) -> Any:
    return require_tensorboard()(str(work_dir / "tensorboard"), purge_step=num_steps_done + 1)
