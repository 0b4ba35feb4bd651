"""``specdec serve``: everything from a configuration to a running server, behind one function."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from serving.flags import ServerFlags
from serving.launch import NO_HEAD, ServerPlan, plan_server
from serving.sockets import free_port
from serving.supervisor import supervise
from specdec.config import RunConfig, ServeConfig
from specdec.device import detect_device
from specdec.doctor import diagnose
from specdec.manifest import HeadManifest, manifest_path
from specdec.targets import Target, resolve_target

logger = logging.getLogger(__name__)

DRAIN_FLAG = "--shutdown-timeout"
SPECULATION_FLAGS = ("--speculative-config", "--per-request-spec-decode-metrics")  # refused by a plain vLLM


def serve(config: RunConfig, head_dir: Path | None, extra_args: list[str], log_path: Path | None = None) -> int:
    """Serve ``config.target`` with the head in ``head_dir`` until stopped; ``extra_args`` go to vLLM as they are.

    Each time that a server is ready, one JSON line goes to standard output and one line for people to standard
    error. A head that can't be used gives a plain server, unless ``serve.require_head``. Port 0 takes a free one.

    Returns: the exit status, 0 after a stop that was asked for.

    Raises:
        ValueError: anything that the caller can mend: see ``resolve_target``, ``manifest_path``, ``plan_server`` and
            ``supervise``; with ``serve.require_head`` also whatever is wrong with the head.
    """
    user = ServerFlags(extra_args)
    settings = _settings(config.serve, user)
    head_dir = _wanted_head(head_dir, settings, user)
    target = resolve_target(config.target)
    manifest, reason = (None, None) if head_dir is None else examine_head(head_dir, target)
    if reason is not None and settings.require_head:
        raise ValueError(reason)
    device = detect_device()

    def planned(speculation: bool) -> ServerPlan:
        chosen = dataclasses.replace(settings, speculation=settings.speculation and speculation)
        given = extra_args if speculation else user.without(*SPECULATION_FLAGS)
        return plan_server(target, chosen, config.target, device, head_dir, manifest, [*_own_flags(settings), *given])

    plan = planned(reason is None)
    fallback = planned(False) if plan.head is not None and not settings.require_head else None
    for warning in plan.warnings:
        logger.warning("warning: %s", warning)
    if reason is not None:
        logger.error("serving plain, without speculation, because %s", reason)
    return supervise(plan, fallback, settings, announce, reason, log_path)


def _wanted_head(head_dir: Path | None, settings: ServeConfig, user: ServerFlags) -> Path | None:
    """The head's folder, None when none is served. Mistakes are said before a large target is fetched."""
    if not settings.speculation or "--speculative-config" in user:
        return None
    if head_dir is None:
        raise ValueError(NO_HEAD)
    return manifest_path(head_dir).parent


def _settings(settings: ServeConfig, user: ServerFlags) -> ServeConfig:
    """``settings`` with what only the moment or vLLM's own flags decide."""
    drain_sec = user.get_int(DRAIN_FLAG)
    return dataclasses.replace(
        settings,
        port=settings.port or free_port(settings.host),
        drain_sec=settings.drain_sec if drain_sec is None else drain_sec,
    )


def _own_flags(settings: ServeConfig) -> list[str]:
    """In front of the user's flags, which win. What is asked for every second would fill the access log."""
    quiet = "/health,/metrics,/specdec/live,/specdec/status"
    return [DRAIN_FLAG, str(settings.drain_sec), "--disable-access-log-for-endpoints", quiet]


def examine_head(head_dir: Path, target: Target) -> tuple[HeadManifest | None, str | None]:
    """The head's manifest, or in one line why vLLM could not serve it as it was trained. Reads no weights.

    Whatever its files hold, no exception: damage that nobody foresaw must not keep the target from being served.
    """
    try:
        manifest = HeadManifest.load(head_dir)
        manifest.check_target(target.fingerprint(), target.is_quantised)
        findings = diagnose(head_dir, target)
    except Exception as error:
        fault = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    else:
        if not findings:
            return manifest, None
        more = f" (and more: specdec doctor {head_dir})" if len(findings) > 1 else ""
        fault = f"{findings[0].what}; {findings[0].fix}{more}"
    return None, f"head {head_dir} can't be used: {' '.join(fault.split())}"


def announce(plan: ServerPlan, reason: str | None = None) -> None:
    """The ready lines. ``pid`` is the process to signal: ending it ends the server."""
    mode = "plain" if plan.head is None else "speculating"
    facts = {
        "ready": True,
        "url": plan.url,
        "model": plan.served_model_name,
        "target": plan.target,
        "head": plan.head,
        "num_speculative_tokens": plan.num_speculative_tokens,
        "dtype": plan.dtype,
        "pid": os.getpid(),
        "mode": mode,
        "reason": reason,
    }
    _say(sys.stdout, json.dumps(facts))
    _say(
        sys.stderr,
        f"ready: {plan.url} model={plan.served_model_name} head={plan.head} K={plan.num_speculative_tokens} "
        f"dtype={plan.dtype} mode={mode}{f' because {reason}' if reason else ''}",
    )


def _say(stream: TextIO, line: str) -> None:
    """Unbuffered: a reader who has gone must end neither the server nor, at our exit, its good exit status."""
    with suppress(OSError):
        os.write(stream.fileno(), f"{line}\n".encode())
