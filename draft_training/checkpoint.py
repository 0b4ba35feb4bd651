"""Two checkpoint files, the newest and the one before, written so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import errno
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from draft_training.run_identity import differences

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint.pt"
PREVIOUS_NAME = "checkpoint.previous.pt"


def save_checkpoint(work_dir: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` beside the old checkpoint, which becomes the previous one.

    Raises:
        ValueError: the disk is full; the old checkpoint is kept.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    temporary = work_dir / f".{CHECKPOINT_NAME}.partial"
    newest = work_dir / CHECKPOINT_NAME
    try:
        with temporary.open("wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.is_file():
            newest.replace(work_dir / PREVIOUS_NAME)
        temporary.replace(newest)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"cannot write the checkpoint in {work_dir} ({error}); the previous one is kept: "
            "free some space and run again"
        ) from error


def load_checkpoint(work_dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest readable checkpoint of an earlier run with the same ``identity``, on the CPU; None: there is none.

    Raises:
        ValueError: it belongs to another configuration or other rows (which are named), or none can be read.
    """
    paths = [path for name in (CHECKPOINT_NAME, PREVIOUS_NAME) if (path := work_dir / name).is_file()]
    failures = []
    for path in paths:
        try:
            _check_sums(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways
            failures.append(f"{path} can't be read ({type(error).__name__}: {error})")
            continue
        if checkpoint["identity"] != identity:
            raise ValueError(
                f"{work_dir} holds a run with other settings or rows "
                f"({differences(checkpoint['identity'], identity)}); pass another --out, or delete it to start over"
            )
        for failure in failures:
            logger.warning("%s: going on from the checkpoint before it", failure)
        return checkpoint
    if failures:
        raise ValueError(f"{'; '.join(failures)}; delete {work_dir} to start over")
    return None


def _check_sums(path: Path) -> None:
    """torch.save writes a checksum of every tensor, and torch.load looks at none."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
