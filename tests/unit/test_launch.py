"""The server's plan for each device, and a server's process: ready, failed, stopped, orphaned."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving import launch
from serving.launch import ServerPlan, core_ranges, plan_server
from serving.process import check_port_free, failure_cause, free_port
from serving.serve import serve
from specdec.config import RunConfig, ServeConfig, TargetConfig
from specdec.device import Device
from specdec.manifest import HeadManifest
from specdec.targets import Target

CPU = Device(kind="cpu", core_ids=(0, 1), native_bf16=False)
CUDA = Device(kind="cuda", core_ids=(0, 1), native_bf16=True)
TARGET = Target(
    name="tiny",
    path=Path("/models/tiny"),
    config={
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 32768,
        "dtype": "bfloat16",
    },
)


def manifest(num_speculative_tokens: int = 3) -> HeadManifest:
    return HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=num_speculative_tokens,
        target_name="tiny",
        target=None,  # type: ignore[arg-type]
        draft_vocab_size=32,
    )


def plan(*extra: str, device: Device = CPU, head: bool = True, dtype: str = "auto", **serve_options) -> ServerPlan:
    return plan_server(
        TARGET,
        ServeConfig(**serve_options),
        TargetConfig(name="tiny", dtype=dtype),
        device,
        Path("/heads/a") if head else None,
        manifest() if head else None,
        list(extra),
        environ={},
    )


def flag(planned: ServerPlan, name: str) -> str:
    assert planned.argv.count(name) == 1, planned.argv
    return planned.argv[planned.argv.index(name) + 1]


def test_a_cpu_plan_prefills_each_prompt_in_one_step_with_room_for_running_requests():
    planned = plan()
    assert planned.argv[:3] == [sys.executable, "-m", launch.ENTRY_MODULE]
    assert flag(planned, "--model") == "/models/tiny"
    assert flag(planned, "--dtype") == planned.dtype == "float32"
    assert "--no-enable-chunked-prefill" in planned.argv
    assert int(flag(planned, "--max-num-batched-tokens")) == launch.CPU_DEFAULT_MODEL_LEN + 16 * 4
    assert planned.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert planned.env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    expected = {"method": "eagle3", "model": "/heads/a", "num_speculative_tokens": 3}
    assert json.loads(flag(planned, "--speculative-config")) == expected
    assert (planned.head, planned.num_speculative_tokens, planned.url) == ("eagle3", 3, "http://127.0.0.1:8000")


def test_a_cuda_plan_leaves_dtype_length_and_environment_to_vllm():
    planned = plan(device=CUDA)
    assert "--dtype" not in planned.argv
    assert "--no-enable-chunked-prefill" not in planned.argv
    assert flag(planned, "--max-model-len") == "auto"
    assert (planned.env, planned.dtype) == ({}, "bfloat16")
    assert flag(plan(device=CUDA, dtype="float16"), "--dtype") == "float16"


def test_speculation_off_serves_plain_even_with_a_head():
    for planned in (plan(speculation=False), plan(speculation=False, head=False)):
        assert "--speculative-config" not in planned.argv
        assert (planned.head, planned.num_speculative_tokens) == (None, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": False}, r"--head DIR, or --no-speculation"),
        ({"num_speculative_tokens": 4}, r"4 but head .* trained for 3"),
        ({"num_speculative_tokens": 0}, r"at least 1, got 0"),
        ({"max_model_len": 65536}, r"takes 1 to 32768 tokens"),
        ({"kv_cache_gib": 0}, r"kv_cache_gib=0 holds no request"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_fewer_draft_tokens_than_trained_and_options_of_the_config_reach_the_plan():
    planned = plan(num_speculative_tokens=2, max_model_len=512, max_num_seqs=4, threads_bind="0", enforce_eager=True)
    assert json.loads(flag(planned, "--speculative-config"))["num_speculative_tokens"] == 2
    assert (flag(planned, "--max-model-len"), flag(planned, "--max-num-seqs")) == ("512", "4")
    assert int(flag(planned, "--max-num-batched-tokens")) == 512 + 4 * 3
    assert planned.env["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert "--enforce-eager" in planned.argv


def test_the_length_shrinks_to_what_the_kv_space_holds(monkeypatch):
    monkeypatch.setattr(launch, "_kv_bytes_per_token", lambda target, dtype: 2**20)
    assert flag(plan(), "--max-model-len") == str(2048 - launch.KV_BLOCK_TOKENS)


def test_flags_after_the_dashes_win_in_every_spelling():
    planned = plan(
        "--max_model_len=1k", "--port", "9000", "--host=::", "--served-model-name", "mine", "--dtype", "bfloat16",
        "--max-num-seqs=2", "-sc", '{"method": "ngram", "num_speculative_tokens": 5}',
    )  # fmt: skip
    for name in ("--max-model-len", "--port", "--host", "--speculative-config", "--enforce-eager"):
        assert name not in planned.argv[: planned.argv.index("--max_model_len=1k")]
    assert (planned.url, planned.served_model_name, planned.dtype) == ("http://[::1]:9000", "mine", "bfloat16")
    assert (planned.head, planned.num_speculative_tokens) == ("ngram", 5)
    assert int(flag(planned, "--max-num-batched-tokens")) == 1000 + 2 * 6
    assert "--no-enable-chunked-prefill" not in plan("--enable-chunked-prefill").argv
    with pytest.raises(ValueError, match="one JSON object"):
        plan("--speculative-config.method", "ngram")


def test_several_ranks_leave_the_cores_to_vllm():
    assert plan("-tp", "2").env["VLLM_CPU_OMP_THREADS_BIND"] == "auto"
    assert core_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


def test_a_port_in_use_is_refused_before_anything_starts():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use; stop what listens there or pass --port"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)
    with pytest.raises(ValueError, match="out of range"):
        check_port_free("127.0.0.1", 80)
    with pytest.raises(ValueError, match="not an address of this machine"):
        check_port_free("192.0.2.1", 8000)


def test_serve_asks_for_a_head_before_it_fetches_a_target():
    with pytest.raises(ValueError, match=r"--head DIR, or --no-speculation"):
        serve(RunConfig(target=TargetConfig(name="nobody/has-this")), None, [])


def test_the_cause_is_the_innermost_error_not_its_wrappers():
    lines = [
        "(EngineCore pid=7) ERROR 11-21 22:10:00 [core.py:12] ValueError: head is too small",
        "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s)",
        "some last words",
    ]
    assert failure_cause(lines, 1) == "ValueError: head is too small"
    assert failure_cause(["api_server.py: error: unrecognized arguments: --x"], 2).endswith("arguments: --x")
    assert failure_cause([], 137) == "killed by signal 9 (out of memory?)"


# A stand-in for vLLM: a server with a child that ignores SIGTERM and a grandchild that left the session.
FAKE = """
import http.server, os, signal, subprocess, sys, threading, time
port, mode, pids = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stubborn = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
loner = f"import os, time; os.setsid(); open({pids!r}, 'a').write(f'{os.getpid()}\\\\n'); time.sleep(300)"
child = stubborn + f"subprocess.Popen([sys.executable, '-c', {loner!r}]); "
child += f"import os; open({pids!r}, 'a').write(f'{{os.getpid()}}\\\\n'); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", child])
open(pids, "a").write(f"{os.getpid()}\\n")
while len(open(pids).read().split()) < 3:
    time.sleep(0.01)
print("hello on stdout", flush=True)
if mode == "fail":
    print("ValueError: no such head", file=sys.stderr)
    sys.exit(1)
if mode == "hang":
    time.sleep(300)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else lambda *_: os._exit(0))
if mode == "die":
    threading.Timer(1.0, lambda: (print("RuntimeError: engine died", flush=True), os._exit(3))).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
DRIVER = """
import json, pathlib, sys
from serving import process, serve
from serving.launch import ServerPlan
process.GRACE_SEC = 1.0
plan = ServerPlan(**json.loads(sys.argv[1]))
log = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
try:
    sys.exit(process.run_server(plan, float(sys.argv[2]), lambda: serve.announce(plan), log))
except ValueError as error:
    sys.exit(f"error: {error}")
"""


class Fake:
    """A driver that serves the stand-in, as a process of its own."""

    def __init__(self, folder: Path, mode: str, *, timeout_sec: float = 30.0, log: Path | None = None) -> None:
        script = folder / "fake.py"
        script.write_text(FAKE)
        self.pids_path = folder / "pids"
        port = free_port("127.0.0.1")
        planned = {
            "argv": [sys.executable, str(script), str(port), mode, str(self.pids_path)],
            "env": {}, "url": f"http://127.0.0.1:{port}", "host": "127.0.0.1", "port": port, "served_model_name": "m",
            "target": "t", "head": None, "num_speculative_tokens": 0, "dtype": "float32",
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, json.dumps(planned), str(timeout_sec), *([str(log)] if log else [])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def assert_nothing_left(self) -> None:
        pids = [int(pid) for pid in self.pids_path.read_text().split()]
        assert len(pids) == 3
        deadline = time.monotonic() + 10
        while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.05)


def test_one_ready_line_then_sigterm_ends_even_stubborn_processes(tmp_path: Path):
    fake = Fake(tmp_path, "serve")
    facts = fake.ready()
    assert facts["ready"] is True
    assert (facts["pid"], facts["model"], facts["head"]) == (fake.process.pid, "m", None)
    fake.process.send_signal(signal.SIGTERM)
    code, out, err = fake.end()
    assert (code, out) == (0, "")
    assert "hello on stdout" in err  # the server's own output never mixes with ours
    assert f"ready: {facts['url']} model=m head=None K=0 dtype=float32" in err
    assert "Traceback" not in err
    fake.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path, number):
    fake = Fake(tmp_path, "deaf")
    fake.ready()
    fake.process.send_signal(number)
    assert fake.end()[0] == 0
    fake.assert_nothing_left()


def test_kill_9_of_the_owner_leaves_no_orphan(tmp_path: Path):
    fake = Fake(tmp_path, "deaf")
    fake.ready()
    os.kill(fake.process.pid, signal.SIGKILL)
    fake.assert_nothing_left()


def test_a_failed_start_says_why_and_keeps_the_log(tmp_path: Path):
    fake = Fake(tmp_path, "fail", log=tmp_path / "server.log")
    code, out, err = fake.end()
    assert (code, out) == (1, "")
    assert err.startswith("error: vLLM did not start: ValueError: no such head\nlast lines of its log:\n")
    assert "hello on stdout" in (tmp_path / "server.log").read_text()
    fake.assert_nothing_left()


def test_a_start_that_hangs_is_given_up(tmp_path: Path):
    fake = Fake(tmp_path, "hang", timeout_sec=3.0)
    code, _, err = fake.end()
    assert code == 1
    assert "was not ready after 3 s" in err
    fake.assert_nothing_left()


def test_an_engine_that_dies_later_ends_with_1_and_its_reason(tmp_path: Path):
    fake = Fake(tmp_path, "die")
    fake.ready()
    code, _, err = fake.end()
    assert code == 1
    assert "vLLM ended: RuntimeError: engine died" in err
    fake.assert_nothing_left()
