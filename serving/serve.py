"""``specdec serve``: everything from a configuration to a running server, behind one function."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

from serving.flags import ServerFlags
from serving.launch import NO_HEAD, ServerPlan, plan_server
from serving.process import run_server
from serving.sockets import free_port
from specdec.config import RunConfig
from specdec.device import detect_device
from specdec.manifest import HeadManifest
from specdec.targets import resolve_target

logger = logging.getLogger(__name__)


def serve(config: RunConfig, head_dir: Path | None, extra_args: list[str], log_path: Path | None = None) -> int:
    """Serve ``config.target`` with the head in ``head_dir`` until stopped; ``extra_args`` go to vLLM as they are.

    When the server answers, one JSON line goes to standard output and one line for people to standard error.
    Port 0 takes a free one.

    Returns: the exit status, 0 after a stop that was asked for.

    Raises:
        ValueError: anything that the caller can mend: see ``resolve_target``, ``HeadManifest.load``,
            ``HeadManifest.check_target``, ``plan_server`` and ``run_server``.
    """
    settings = config.serve
    if settings.port == 0:
        settings = dataclasses.replace(settings, port=free_port(settings.host))
    manifest = None
    if settings.speculation and "--speculative-config" not in ServerFlags(extra_args):
        if head_dir is None:  # said before a large target is fetched
            raise ValueError(NO_HEAD)
        manifest = HeadManifest.load(head_dir)
    target = resolve_target(config.target)
    if manifest is not None:
        manifest.check_target(target.fingerprint())
    plan = plan_server(target, settings, config.target, detect_device(), head_dir, manifest, extra_args)
    for warning in plan.warnings:
        logger.warning("warning: %s", warning)
    return run_server(plan, settings.startup_timeout_sec, lambda: announce(plan), log_path)


def announce(plan: ServerPlan) -> None:
    """The ready lines. ``pid`` is the process to signal: ending it ends the server."""
    facts = {
        "ready": True,
        "url": plan.url,
        "model": plan.served_model_name,
        "target": plan.target,
        "head": plan.head,
        "num_speculative_tokens": plan.num_speculative_tokens,
        "dtype": plan.dtype,
        "pid": os.getpid(),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    sys.stderr.write(
        f"ready: {plan.url} model={plan.served_model_name} head={plan.head} "
        f"K={plan.num_speculative_tokens} dtype={plan.dtype}\n"
    )
