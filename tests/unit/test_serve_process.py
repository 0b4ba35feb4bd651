"""``specdec serve`` as a process, from its command line to its exit status. Only vLLM's module is replaced: by
tests/fake_vllm.py, which refuses, crashes and hangs when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from serving.serve import examine_head
from serving.sockets import free_port
from specdec.config import TargetConfig
from specdec.manifest import MANIFEST_NAME, HeadManifest
from specdec.targets import resolve_target

ROOT = Path(__file__).resolve().parent.parent.parent
DRIVER = """
from serving import launch, process, supervisor
launch.ENTRY_MODULE, process.GRACE_SEC, supervisor.HEALTH_EVERY_SEC = "tests.fake_vllm", 1.0, 0.2
process.PROBE_SEC = 1.0
from specdec.cli import main
main()
"""
HIDDEN, VOCAB = 8, 32


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("target")
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": 2,
        "num_attention_heads": 1, "max_position_embeddings": 512, "rope_theta": 10000.0,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(4, np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def head(target: Path, tmp_path: Path) -> Path:
    """An EAGLE-1 head that nothing is wrong with."""
    directory = tmp_path / "head"
    directory.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB, "rope_theta": 10000.0}
    (directory / "config.json").write_text(json.dumps(config))
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    square = np.zeros((HIDDEN, HIDDEN), np.float32)
    tensors = {f"layers.0.{name}.weight": square for name in (*names, "post_attention_layernorm")}
    save_file({"fc.weight": np.zeros((HIDDEN, 2 * HIDDEN), np.float32), **tensors}, directory / "model.safetensors")
    HeadManifest(
        head="eagle", vllm_method="eagle", num_speculative_tokens=3, target_name="t", draft_vocab_size=VOCAB,
        target=resolve_target(TargetConfig(name=str(target))).fingerprint(),
    ).save(directory)  # fmt: skip
    return directory


class Service:
    """A ``specdec serve`` process."""

    def __init__(self, folder: Path, target: Path, *options: object, vllm: tuple[str, ...] = ()) -> None:
        self.folder = folder
        command = [sys.executable, "-c", DRIVER, "serve", "--target", target, "--port", free_port("127.0.0.1")]
        command += [*options, "--", "--fake-dir", folder, *vllm]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, self.end()
        return json.loads(line)

    def get(self, facts: dict[str, Any], path: str = "/", timeout_sec: float = 10.0) -> dict[str, Any]:
        return httpx.get(f"{facts['url']}{path}", timeout=timeout_sec, trust_env=False).json()

    def poke(self, facts: dict[str, Any], path: str) -> None:
        """Send a request that will have no answer."""
        with pytest.raises(httpx.HTTPError):
            self.get(facts, path, timeout_sec=1.0)

    def starts(self) -> list[list[str]]:
        """Flags of each vLLM that was started."""
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def await_start(self) -> None:
        deadline = time.monotonic() + 30
        while not self.starts():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    def end(self, number: int | None = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit status, the rest of standard output, and standard error; every process is gone."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        deadline = time.monotonic() + 10
        path = self.folder / "pids"
        pids = path.read_text().split() if path.exists() else []
        while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.05)
        assert "Traceback" not in err, err
        return self.process.returncode, out, err

    def refused(self) -> str:
        """The one line of a mistake of the user's."""
        code, out, err = self.end(None)
        assert (code, out) == (2, ""), err
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        return last


@pytest.fixture
def serve(tmp_path: Path, target: Path) -> Iterator[Any]:
    services: list[Service] = []

    def start(*options: object, vllm: tuple[str, ...] = ()) -> Service:
        services.append(Service(tmp_path, target, *options, vllm=vllm))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        service.process.communicate()


def test_a_good_head_speculates_and_the_status_page_is_told(serve, head: Path):
    service = serve("--head", head)
    facts = service.ready()
    assert (facts["mode"], facts["reason"], facts["head"]) == ("speculating", None, "eagle")
    status = service.get(facts)
    assert status.pop("started_at") == pytest.approx(time.time(), abs=60)
    assert status == {
        "head": "eagle", "target": facts["target"], "mode": None, "reason": None, "max_speculative_tokens": 3,
        "num_restarts": 0, "head_dir": str(head),
    }  # fmt: skip
    assert service.end()[:2] == (0, "")


def cut(head: Path) -> None:
    path = head / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def scramble(head: Path) -> None:
    (head / "model.safetensors").write_bytes(bytes(range(256)) * 4)


def damage_manifest(head: Path) -> None:
    (head / MANIFEST_NAME).write_text('{"head": "eagle", ')


def retarget(head: Path) -> None:
    manifest = HeadManifest.load(head)
    manifest.target.weights_sha256 = "of another target"
    manifest.save(head)


def widen(head: Path) -> None:
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps({**config, "vocab_size": 2 * VOCAB}))


def nonsense(head: Path) -> None:
    (head / "config.json").write_text('{"architectures": 7}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "is truncated"),
        (scramble, "no safetensors file"),
        (damage_manifest, "specdec.json is damaged"),
        (retarget, "trained for another target"),
        (widen, "vocab_size is 64"),
        (nonsense, "can't be judged"),
    ],
)
def test_what_is_wrong_with_a_head_is_found_before_a_start(target: Path, head: Path, damage, reason: str):
    resolved = resolve_target(TargetConfig(name=str(target)))
    manifest, fault = examine_head(head, resolved)
    assert (manifest.head, fault) == ("eagle", None)
    damage(head)
    manifest, fault = examine_head(head, resolved)
    assert manifest is None and fault.startswith(f"head {head} can't be used: ") and reason in fault


def test_a_bad_head_is_served_plain_without_a_try(serve, head: Path):
    cut(head)
    service = serve("--head", head, vllm=("--per-request-spec-decode-metrics", "detailed"))
    facts = service.ready()
    assert (facts["mode"], facts["head"], facts["num_speculative_tokens"]) == ("plain", None, 0)
    assert "is truncated" in facts["reason"]
    assert service.get(facts).items() >= {"mode": "plain", "reason": facts["reason"], "head": None}.items()
    [flags] = service.starts()
    assert not {"--speculative-config", "--per-request-spec-decode-metrics", "detailed"} & set(flags)
    code, _, err = service.end()
    assert code == 0
    assert f"serving plain, without speculation, because {facts['reason']}" in err


def test_with_require_head_a_bad_head_is_an_error(serve, head: Path):
    cut(head)
    service = serve("--head", head, "--set", "serve.require_head=true")
    assert "is truncated" in service.refused()
    assert service.starts() == []


def test_a_head_that_vllm_refuses_is_served_plain_or_with_require_head_not_at_all(serve, head: Path):
    service = serve("--head", head, vllm=("--fake", "refuse-head"))
    facts = service.ready()
    assert facts["mode"] == "plain"
    assert facts["reason"] == "with speculation: vLLM did not start: ValueError: it does not load"
    assert ["--speculative-config" in flags for flags in service.starts()] == [True, False]
    assert service.end()[0] == 0
    strict = serve("--head", head, "--set", "serve.require_head=true", vllm=("--fake", "refuse-head"))
    assert strict.refused() == "error: vLLM did not start: ValueError: it does not load"


def test_what_does_not_start_plain_either_is_a_mistake(serve, head: Path):
    service = serve("--head", head, vllm=("--fake", "refuse"))
    assert service.refused() == "error: vLLM did not start: ValueError: it does not load"


def test_mistakes_in_naming_or_using_a_head_stay_errors(serve, head: Path, tmp_path: Path):
    assert "does not exist" in serve("--head", tmp_path / "nowhere").refused()
    too_many = serve("--head", head, "--set", "serve.num_speculative_tokens=4")
    assert "was trained for 3" in too_many.refused()
    (head / MANIFEST_NAME).unlink()
    assert f"holds no {MANIFEST_NAME}" in serve("--head", head).refused()


def test_a_crash_is_followed_by_a_restart_and_a_second_one_by_a_plain_server(serve, head: Path):
    service = serve("--head", head)
    facts = service.ready()
    service.poke(facts, "/die")
    again = service.ready()
    assert again == facts  # the same address and the same head
    assert service.get(again)["num_restarts"] == 1
    service.poke(again, "/die")
    plain = service.ready()
    assert (plain["url"], plain["mode"]) == (facts["url"], "plain")
    assert "failed 2 times in a row, at last: vLLM ended: RuntimeError: engine died" in plain["reason"]
    assert service.get(plain)["num_restarts"] == 2
    code, out, err = service.end()
    assert (code, out) == (0, "")
    assert "restarting vLLM in 1 s (1 of 10)" in err and "restarting vLLM in 2 s (2 of 10)" in err


def test_without_restarts_a_crash_ends_with_1(serve):
    service = serve("--no-speculation", "--set", "serve.max_restarts=0")
    service.poke(service.ready(), "/die")
    code, _, err = service.end(None)
    assert code == 1
    assert "vLLM ended: RuntimeError: engine died" in err


@pytest.mark.parametrize("how", ["/hang", "/stuck"])
def test_a_hung_server_is_restarted_and_one_with_a_stuck_engine_too(serve, how: str):
    service = serve("--no-speculation", "--set", "serve.health_timeout_sec=3")
    facts = service.ready()
    service.poke(facts, how)
    assert service.get(service.ready())["num_restarts"] == 1
    assert "gave no healthy answer for 3 s" in service.end()[2]


def test_a_stop_in_back_off_ends_at_once(serve):
    service = serve("--no-speculation")
    service.poke(service.ready(), "/die")
    for line in service.process.stderr:
        if "restarting vLLM" in line:
            break
    assert service.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_start_that_is_stopped_leaves_nothing(serve, head: Path, number: int):
    service = serve("--head", head, vllm=("--fake", "slow"))
    service.await_start()
    assert service.end(number)[0] == (0 if number == signal.SIGTERM else -signal.SIGKILL)


def test_kill_9_after_a_restart_leaves_nothing(serve):
    service = serve("--no-speculation")
    service.poke(service.ready(), "/die")
    service.ready()
    assert service.end(signal.SIGKILL)[0] == -signal.SIGKILL


class Request(threading.Thread):
    """A request in flight; it takes two seconds. ``answer`` stays None when the connection is closed."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.url, self.answer = service.ready()["url"], None
        self.start()
        while not (service.folder / "later").exists():
            assert self.is_alive()
            time.sleep(0.02)

    def run(self) -> None:
        with suppress(httpx.HTTPError):
            self.answer = httpx.get(f"{self.url}/later", trust_env=False, timeout=30).status_code


def test_requests_in_flight_are_answered_before_a_stop(serve):
    service = serve("--no-speculation")
    request = Request(service)
    assert service.end()[0] == 0
    request.join()
    assert request.answer == 200


@pytest.mark.parametrize("how", ["drain_sec", "flag", "second signal"])
def test_a_drain_ends_after_its_time_or_at_a_second_signal(serve, how: str):
    options = ("--set", "serve.drain_sec=0") if how == "drain_sec" else ()
    service = serve("--no-speculation", *options, vllm=("--shutdown-timeout", "0") if how == "flag" else ())
    request = Request(service)
    if how == "second signal":
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # two signals of a kind that come together are one
    assert service.end()[0] == 0
    request.join()
    assert request.answer is None


def test_nobody_has_to_read_what_it_says(serve):
    service = serve("--no-speculation")
    facts = service.ready()
    service.process.stdout.close()
    service.poke(facts, "/die")
    deadline = time.monotonic() + 20
    while len(service.starts()) < 2 or not _answers(service, facts):
        assert service.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # the second ready line meets a closed pipe
    service.process.stdout = open(os.devnull)  # noqa: PTH123, SIM115 - for communicate()
    assert service.end()[0] == 0


def _answers(service: Service, facts: dict[str, Any]) -> bool:
    try:
        return bool(service.get(facts))
    except httpx.HTTPError:
        return False
