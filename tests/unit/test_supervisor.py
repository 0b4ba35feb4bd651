"""When a server is restarted, when it is replaced by a plain one, and how it is stopped: on a clock that is turned by
hand. The same with real processes is in test_serve_process.py."""

from __future__ import annotations

import json

import pytest

from serving.engine_status import FACTS_VARIABLE
from serving.launch import ServerPlan
from serving.supervisor import HEALTH_EVERY_SEC, POLL_SEC, STABLE_SEC, State, Supervisor
from specdec.config import ServeConfig


def plan(head: str | None) -> ServerPlan:
    return ServerPlan(
        argv=[], env={"A": "1"}, url="http://h:1", host="h", port=1, served_model_name="m", target="t", head=head,
        num_speculative_tokens=3 if head else 0, dtype="float32",
    )  # fmt: skip


class FakeServer:
    """A process that does as it is told; ready at once unless told otherwise."""

    def __init__(self, planned: ServerPlan) -> None:
        self.plan = planned
        self.returncode: int | None = None
        self.healthy = True
        self.calls: list[str] = []

    def is_healthy(self) -> bool:
        return self.healthy

    def stop(self) -> None:
        self.calls.append("stop")

    def end(self) -> None:
        self.calls.append("end")
        self.returncode = 137 if self.returncode is None else self.returncode

    def failure(self, what: str) -> str:
        return f"vLLM {what}: status {self.returncode}"

    @property
    def speculates(self) -> bool:
        return self.plan.head is not None

    @property
    def status(self) -> dict:
        return json.loads(self.plan.env[FACTS_VARIABLE])


class World:
    """A supervisor, its clock, and the servers that it started."""

    def __init__(self, *, head: bool = True, fallback: bool = True, **settings) -> None:
        self.now_sec = 100.0
        self.servers: list[FakeServer] = []
        self.ready: list[tuple[ServerPlan, str | None]] = []
        self.refuses = {True: False, False: False}  # by whether it speculates
        self.supervisor = Supervisor(
            plan("eagle3" if head else None),
            plan(None) if fallback else None,
            ServeConfig(**settings),
            self._spawn,
            lambda planned, reason: self.ready.append((planned, reason)),
            now=lambda: self.now_sec,
            sleep=self._sleep,
        )

    def _spawn(self, planned: ServerPlan) -> FakeServer:
        server = FakeServer(planned)
        server.returncode = 1 if self.refuses[server.speculates] else None
        self.servers.append(server)
        return server

    def _sleep(self, sec: float) -> None:
        self.now_sec += sec

    @property
    def server(self) -> FakeServer:
        return self.servers[-1]

    def run(self, sec: float) -> None:
        """Let time pass, a step every POLL_SEC."""
        end_sec = self.now_sec + sec
        while self.now_sec < end_sec and self.supervisor.state is not State.ENDED:
            self.supervisor.step()
            self._sleep(POLL_SEC)

    def run_until_ready(self) -> float:
        """How long it took."""
        begin_sec, known = self.now_sec, len(self.ready)
        while len(self.ready) == known:
            assert self.now_sec - begin_sec < 1000 and self.supervisor.state is not State.ENDED
            self.run(POLL_SEC)
        return self.now_sec - begin_sec

    def crash(self) -> None:
        self.server.returncode = 1


def test_restarts_wait_1_2_4_up_to_60_sec_and_a_long_healthy_phase_starts_over():
    world = World(fallback=False, max_restarts=20)
    world.run_until_ready()
    waits = []
    for _ in range(8):
        world.crash()
        waits.append(world.run_until_ready())
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60], abs=4 * POLL_SEC)
    world.run(STABLE_SEC)
    world.crash()
    assert world.run_until_ready() == pytest.approx(1, abs=4 * POLL_SEC)
    assert world.supervisor.num_restarts == world.server.status["num_restarts"] == len(world.servers) - 1 == 9


@pytest.mark.parametrize("max_restarts", [0, 1, 3])
def test_it_gives_up_after_as_many_restarts_as_allowed_in_a_row(max_restarts):
    world = World(head=False, fallback=False, max_restarts=max_restarts)
    world.run_until_ready()
    for _ in range(max_restarts):
        world.crash()
        world.run_until_ready()
    world.crash()
    assert world.supervisor.run() == 1
    assert len(world.servers) == 1 + max_restarts


def test_starts_that_fail_after_a_crash_are_tried_again_and_counted():
    world = World(head=False, fallback=False, max_restarts=3)
    world.run_until_ready()
    world.crash()
    world.refuses[False] = True  # the port is taken for a while, say
    world.run(2)
    world.refuses[False] = False
    world.run_until_ready()
    assert (len(world.servers), world.supervisor.failures) == (3, 2)


def test_what_never_starts_with_speculation_is_served_plain_at_once_and_says_why():
    world = World(max_restarts=0)
    world.refuses[True] = True
    assert world.run_until_ready() < 1
    assert [server.speculates for server in world.servers] == [True, False]
    [(planned, reason)] = world.ready
    assert planned.head is None
    assert reason == "with speculation: vLLM did not start: status 1"
    assert world.server.status.items() >= {
        "mode": "plain", "reason": reason, "head": None, "target": "t", "max_speculative_tokens": 0, "num_restarts": 0,
    }.items()  # fmt: skip
    assert world.server.plan.env["A"] == "1"


def test_a_start_with_speculation_that_hangs_is_killed_and_served_plain():
    world = World(startup_timeout_sec=50.0)
    spawn = world.supervisor.spawn

    def spawn_hanging(planned: ServerPlan) -> FakeServer:
        server = spawn(planned)
        server.healthy = not server.speculates
        return server

    world.supervisor.spawn = spawn_hanging
    assert world.run_until_ready() == pytest.approx(50, abs=1)
    assert world.servers[0].calls == ["end"]
    assert "was not ready after 50 s" in world.ready[0][1]


@pytest.mark.parametrize(("head", "fallback", "starts"), [(True, True, 2), (True, False, 1), (False, False, 1)])
def test_what_does_not_start_plain_either_is_the_callers_mistake(head, fallback, starts):
    world = World(head=head, fallback=fallback)
    world.refuses = {True: True, False: True}
    with pytest.raises(ValueError, match="vLLM did not start: status 1"):
        world.supervisor.run()
    assert len(world.servers) == starts


def test_the_second_crash_in_a_row_ends_speculation():
    world = World()
    world.run_until_ready()
    assert world.server.status["mode"] is None
    world.crash()
    world.run_until_ready()
    assert world.server.speculates
    world.run(STABLE_SEC / 2)
    world.crash()
    world.run_until_ready()
    assert not world.server.speculates
    assert "failed 2 times in a row, at last: vLLM ended: status 1" in world.ready[-1][1]
    assert world.server.status["num_restarts"] == 2
    world.run(2 * STABLE_SEC)
    world.crash()
    world.run_until_ready()
    assert not world.server.speculates and world.ready[-1][1]  # for good, and still said


def test_crashes_far_apart_do_not_end_speculation():
    world = World()
    for _ in range(4):
        world.run_until_ready()
        world.run(STABLE_SEC + 1)
        world.crash()
    world.run_until_ready()
    assert world.server.speculates


def test_a_server_that_does_not_answer_for_long_is_killed_and_restarted():
    world = World(health_timeout_sec=120.0)
    world.run_until_ready()
    world.server.healthy = False
    world.run(115)
    assert len(world.servers) == 1
    world.run(HEALTH_EVERY_SEC + 10)
    assert len(world.servers) == 2
    assert world.servers[0].calls == ["end"]


def test_a_busy_server_that_answers_now_and_then_is_left_alone():
    world = World(health_timeout_sec=120.0)
    world.run_until_ready()
    for _ in range(5):
        world.server.healthy = False
        world.run(100)
        world.server.healthy = True
        world.run(2 * HEALTH_EVERY_SEC)
    assert len(world.servers) == 1


def test_a_ready_server_is_drained_and_a_second_stop_kills_it():
    world = World()
    world.run_until_ready()
    world.supervisor.stop()
    world.run(5)
    assert world.server.calls == ["stop"] and world.supervisor.state is State.DRAINING
    world.supervisor.stop()
    assert world.supervisor.run() == 0
    assert world.server.calls == ["stop", "end"]


def test_a_drained_server_ends_with_0():
    world = World()
    world.run_until_ready()
    world.supervisor.stop()
    world.run(1)
    world.crash()  # whatever its status
    assert world.supervisor.run() == 0
    assert len(world.servers) == 1


def test_a_stop_while_starting_or_waiting_ends_at_once():
    starting = World(startup_timeout_sec=500.0)
    starting.run(POLL_SEC)
    starting.server.healthy = False
    starting.supervisor.stop()
    begin_sec = starting.now_sec
    assert starting.supervisor.run() == 0
    assert starting.server.calls == ["end"] and starting.now_sec == begin_sec
    waiting = World()
    waiting.run_until_ready()
    waiting.crash()
    waiting.run(2 * POLL_SEC)
    assert waiting.supervisor.state is State.WAITING
    waiting.supervisor.stop()
    assert waiting.supervisor.run() == 0
    assert len(waiting.servers) == 1


def test_no_server_outlives_an_error_of_the_supervisor():
    world = World()

    def fail(planned: ServerPlan, reason: str | None) -> None:
        raise RuntimeError("no")

    world.supervisor.on_ready = fail
    with pytest.raises(RuntimeError):
        world.supervisor.run()
    assert world.server.returncode is not None
