"""Keeps a server up: restarts one that ended or hangs, serves plain where speculation is the cause, drains on SIGTERM.

A state machine that is stepped a few times a second. It knows two plans, the wanted one and (unless that is refused)
one without speculation. It goes over to the second for good

* when the first was never ready: speculation does not load, whatever the reason;
* at the second failure in a row, with less than ``STABLE_SEC`` of serving in between.

When nothing was ever ready, with the plain plan neither, it is the caller's mistake: a ``ValueError``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from serving.engine_status import FACTS_VARIABLE
from serving.kept_policy import VARIABLE as KEPT_POLICY_VARIABLE
from serving.launch import ServerPlan
from serving.process import RunningServer, stop_signals
from serving.sockets import check_port_free
from specdec.config import ServeConfig

logger = logging.getLogger(__name__)

POLL_SEC = 0.2
HEALTH_EVERY_SEC = 10.0
STABLE_SEC = 600.0  # of serving, after which earlier failures are forgotten
MAX_SPECULATING_FAILURES = 2
MAX_BACKOFF_SEC = 60.0
PROGRESS_SEC = 15.0


class Server(Protocol):
    """What the supervisor asks of a server's process; see ``RunningServer``."""

    @property
    def returncode(self) -> int | None: ...
    def is_healthy(self) -> bool: ...
    def stop(self) -> None: ...
    def end(self) -> None: ...
    def failure(self, what: str) -> str: ...


class State(Enum):
    """Where the supervisor is."""

    WAITING = auto()  # for the time of the next start
    STARTING = auto()
    READY = auto()
    DRAINING = auto()
    ENDED = auto()


class Supervisor:
    """One service, which may take many server processes.

    Args:
        plan: what to serve.
        fallback: the same without speculation; None: never degrade.
        settings: the section ``serve``.
        spawn: starts a planned server.
        on_ready: called with the plan each time that a server has become ready, and why it is degraded (or None).
        reason: why ``plan`` is degraded already.
        now: a clock, in seconds. ``sleep`` waits for as many.
    """

    def __init__(
        self,
        plan: ServerPlan,
        fallback: ServerPlan | None,
        settings: ServeConfig,
        spawn: Callable[[ServerPlan], Server],
        on_ready: Callable[[ServerPlan, str | None], None],
        *,
        reason: str | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.plan, self.fallback, self.reason = plan, fallback, reason
        self.settings, self.spawn, self.on_ready, self.now, self.sleep = settings, spawn, on_ready, now, sleep
        self.state = State.WAITING
        self.exit_status = 0
        self.failures = 0  # in a row: without STABLE_SEC of serving in between
        self.num_restarts = 0
        self._was_ready = False  # some server, some time
        self._started_at_unix = time.time()
        self._num_stops = 0
        self._server: Server | None = None
        self._since_sec = now()  # the state's beginning; of WAITING its end
        self._next_sec = 0.0  # of a health check, or of a line that says that the start goes on
        self._unhealthy_sec: float | None = None  # of the first failed health check in a row

    def stop(self) -> None:
        """Asked once, let requests in flight end; asked again, or before a server is ready, end at once. Only counts,
        so that a signal handler may call it anywhere."""
        self._num_stops += 1

    def run(self) -> int:
        """Until it is stopped or gives up.

        Returns: 0 when it was stopped, 1 after more than ``max_restarts`` failures in a row.

        Raises:
            ValueError: no server was ever ready; in one line, the cause included.
        """
        try:
            while self.state is not State.ENDED:
                self.step()
                if self.state is not State.ENDED:
                    self.sleep(POLL_SEC)
            return self.exit_status
        finally:
            if self._server is not None:
                self._server.end()

    def step(self) -> None:
        """Look once at what there is to do. Waits for no more than one health check, or a killed server's end."""
        if self._server is None:
            self._wait()
        elif self.state is State.STARTING:
            self._start_up(self._server)
        elif self.state is State.READY:
            self._watch(self._server)
        elif self.state is State.DRAINING:
            self._drain(self._server)

    def _wait(self) -> None:
        if self._num_stops:
            self.state = State.ENDED
        elif self.now() >= self._since_sec:
            status = {FACTS_VARIABLE: json.dumps(self.status())}
            self._server = self.spawn(dataclasses.replace(self.plan, env={**self.plan.env, **status}))
            self._enter(State.STARTING, PROGRESS_SEC)

    def _start_up(self, server: Server) -> None:
        if self._num_stops:
            self._end(server)
        elif server.returncode is not None:
            self._fail(server, "did not start", 0.0)
        elif server.is_healthy():
            self._was_ready = True
            self._enter(State.READY, HEALTH_EVERY_SEC)
            self.on_ready(self.plan, self.reason)
        elif self._elapsed_sec() > self.settings.startup_timeout_sec:
            limit = f"{self.settings.startup_timeout_sec:.0f} s (startup_timeout_sec)"
            self._fail(server, f"was not ready after {limit}", 0.0)
        elif self.now() >= self._next_sec:
            self._next_sec += PROGRESS_SEC
            logger.info("starting vLLM: %.0f s", self._elapsed_sec())

    def _watch(self, server: Server) -> None:
        if self._num_stops:
            logger.info("stopping within %d s; a second signal ends at once", self.settings.drain_sec)
            server.stop()
            self.state = State.DRAINING
        elif server.returncode is not None:
            self._fail(server, "ended", self._elapsed_sec())
        elif self.now() >= self._next_sec:
            self._check_health(server)

    def _check_health(self, server: Server) -> None:
        asked_sec = self.now()
        self._next_sec = asked_sec + HEALTH_EVERY_SEC
        if server.is_healthy():
            self._unhealthy_sec = None
            return
        self._unhealthy_sec = asked_sec if self._unhealthy_sec is None else self._unhealthy_sec
        if self.now() - self._unhealthy_sec >= self.settings.health_timeout_sec:
            limit = f"{self.settings.health_timeout_sec:.0f} s (health_timeout_sec)"
            self._fail(server, f"gave no healthy answer for {limit}", self._elapsed_sec())

    def _drain(self, server: Server) -> None:
        if self._num_stops > 1 or server.returncode is not None:
            self._end(server)

    def _end(self, server: Server) -> None:
        server.end()
        self._server, self.state = None, State.ENDED

    def _fail(self, server: Server, what: str, served_sec: float) -> None:
        """``server`` is of no more use; decide what comes next."""
        message = server.failure(what)
        server.end()
        self._server = None
        if not self._was_ready:
            if self.fallback is None:
                raise ValueError(message)
            self._degrade(self.fallback, message)
            self._enter(State.WAITING)
            return
        logger.error("%s", message)
        self.failures = 1 if served_sec >= STABLE_SEC else self.failures + 1
        if self.failures > self.settings.max_restarts:
            logger.error("giving up: %d failures in a row (max_restarts)", self.failures)
            self.exit_status, self.state = 1, State.ENDED
            return
        if self.fallback is not None and self.failures >= MAX_SPECULATING_FAILURES:
            self._degrade(self.fallback, f"failed {self.failures} times in a row, at last: {message}")
        backoff_sec = min(2.0 ** (self.failures - 1), MAX_BACKOFF_SEC)
        logger.warning("restarting vLLM in %.0f s (%d of %d)", backoff_sec, self.failures, self.settings.max_restarts)
        self.num_restarts += 1
        self._enter(State.WAITING)
        self._since_sec += backoff_sec

    def _degrade(self, fallback: ServerPlan, reason: str) -> None:
        self.plan, self.fallback, self.reason = fallback, None, f"with speculation: {reason}"
        logger.error("serving plain, without speculation, because %s", self.reason)

    def _enter(self, state: State, next_sec: float = 0.0) -> None:
        self.state, self._since_sec, self._unhealthy_sec = state, self.now(), None
        self._next_sec = self._since_sec + next_sec

    def _elapsed_sec(self) -> float:
        return self.now() - self._since_sec

    def status(self) -> dict[str, object]:
        """What a server's status page is told at its start. ``started_at`` is Unix time, of the whole service."""
        return {
            "head": self.plan.head,
            "head_dir": self.plan.head_dir,
            "target": self.plan.target,
            "mode": "plain" if self.reason else None,
            "reason": self.reason,
            "max_speculative_tokens": self.plan.num_speculative_tokens,
            "num_restarts": self.num_restarts,
            "started_at": self._started_at_unix,
        }


def supervise(
    plan: ServerPlan,
    fallback: ServerPlan | None,
    settings: ServeConfig,
    on_ready: Callable[[ServerPlan, str | None], None],
    reason: str | None = None,
    log_path: Path | None = None,
) -> int:
    """Serve until Ctrl-C or SIGTERM; see ``Supervisor``. The servers' log goes to standard error, or to ``log_path``.

    Returns: the exit status, as ``Supervisor.run``.

    Raises:
        ValueError: the port is in use, the log can't be written, or no server could be started.
    """
    check_port_free(plan.host, plan.port)
    try:
        sink = sys.stderr.buffer if log_path is None else log_path.open("wb")
    except OSError as error:
        raise ValueError(f"cannot write the log {log_path}: {error.strerror}") from error

    try:
        with tempfile.TemporaryDirectory(prefix="specdec-") as kept:

            def spawn(planned: ServerPlan) -> RunningServer:
                env = {**planned.env, KEPT_POLICY_VARIABLE: str(Path(kept, "policy"))}
                return RunningServer(dataclasses.replace(planned, env=env), sink, settings.drain_sec, log_path)

            supervisor = Supervisor(plan, fallback, settings, spawn, on_ready, reason=reason)
            with stop_signals(supervisor.stop):
                return supervisor.run()
    finally:
        if log_path is not None:
            sink.close()
