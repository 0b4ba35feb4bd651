"""The policy that was put last, in a file that outlives the engine: a restart goes on with it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from specdec.record import write_json_atomic

logger = logging.getLogger("vllm.specdec")

VARIABLE = "SPECDEC_KEPT_POLICY"  # the file's path, in the environment of each of a service's servers


def keep_policy(policy: str) -> None:
    """For the next start of this service, if it has a file for that."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        write_json_atomic(Path(path), policy)
    except OSError as error:  # it counts all the same, until the engine ends
        logger.error("specdec: a restart will not know of policy %s: %s", policy, error)


def kept_policy() -> str | None:
    """What was put since the service began; None: nothing."""
    try:
        return str(json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8")))
    except (KeyError, OSError):
        return None
