"""The policy that was put last, in a file that outlives the engine: a restart goes on with it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("vllm.specdec")

VARIABLE = "SPECDEC_KEPT_POLICY"  # the file's path, in the environment of each of a service's servers


def keep_policy(policy: str) -> None:
    """For the next start of this service, if it has a file for that."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    part = Path(f"{path}.part")
    try:
        part.write_text(policy, encoding="utf-8")
        part.replace(path)
    except OSError as error:  # it counts all the same, until the engine ends
        logger.error("specdec: a restart will not know of policy %s: %s", policy, error)


def kept_policy() -> str | None:
    """What was put since the service began; None: nothing."""
    try:
        return Path(os.environ[VARIABLE]).read_text(encoding="utf-8")
    except (KeyError, OSError):
        return None
