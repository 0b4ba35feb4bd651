"""One checkpoint file, replaced atomically: a kill at any moment leaves the last whole one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_NAME = "checkpoint.pt"


def save_checkpoint(work_dir: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` beside the old checkpoint, then replace it.

    Raises:
        ValueError: the disk is full; the old checkpoint is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    temporary = work_dir / f".{CHECKPOINT_NAME}.partial"
    try:
        with temporary.open("wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(work_dir / CHECKPOINT_NAME)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"cannot write the checkpoint in {work_dir} ({error}); the previous one is kept: "
            "free some space and run again"
        ) from error


def load_checkpoint(work_dir: Path, identity: str, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint of an earlier run with the same ``identity``; None when there is none.

    Raises:
        ValueError: it belongs to another configuration or other rows, or can't be read.
    """
    path = work_dir / CHECKPOINT_NAME
    if not path.is_file():
        return None
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} can't be read ({error}); delete it to start over") from error
    if checkpoint["identity"] != identity:
        raise ValueError(
            f"{work_dir} holds a run with other settings or rows; pass another --out, or delete it to start over"
        )
    return checkpoint
