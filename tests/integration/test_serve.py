"""``specdec serve`` with real vLLM on the embedded target: plain, then with an untrained EAGLE-3 head. And what it does
about a broken head and a killed engine, on a tiny target.

An untrained head proposes nonsense, which the target rejects: enough to see that heads load, draft and verify.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from specdec.config import TargetConfig
from specdec.manifest import HeadManifest
from specdec.targets import Target, resolve_target
from tests.tiny import save_tiny_target

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 768
TINY_MODEL_LEN = 256
TINY_OPTIONS = ("--set", f"serve.max_model_len={TINY_MODEL_LEN}")
START_SEC = 300.0
SERVE = [sys.executable, "-m", "specdec", "serve"]
DRAFT_VOCAB_SIZE = 256
NUM_SPECULATIVE_TOKENS = 3


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    pytest.importorskip("vllm", reason="needs vLLM")
    return resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path_factory.mktemp("tiny")))))


def write_head(target: Target, directory: Path) -> Path:
    """An EAGLE-3 head with random weights for ``target``."""
    import torch
    from safetensors.torch import save_file

    config = target.config
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    num_layers = config["num_hidden_layers"]
    dropped = ("architectures", "dtype", "num_hidden_layers", "tie_word_embeddings")
    head_config = {
        **{key: value for key, value in config.items() if key not in dropped},
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "target_hidden_size": hidden,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": [1, num_layers // 2, num_layers - 1],
        "num_aux_hidden_states": 3,
    }
    (directory / "config.json").write_text(json.dumps(head_config))
    generator = torch.Generator().manual_seed(0)
    matrices = {
        "fc": (hidden, 3 * hidden), "lm_head": (DRAFT_VOCAB_SIZE, hidden),
        "midlayer.self_attn.q_proj": (hidden, 2 * hidden), "midlayer.self_attn.k_proj": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj": (kv, 2 * hidden), "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.mlp.gate_proj": (inner, hidden), "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.02 for name, shape in matrices.items()}
    norms = ("midlayer.input_layernorm", "midlayer.hidden_norm", "midlayer.post_attention_layernorm", "norm")
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    # Offsets, not ids: pairs of neighbours all over the vocabulary.
    tensors["d2t"] = torch.arange(DRAFT_VOCAB_SIZE) // 2 * 2 * (vocab // DRAFT_VOCAB_SIZE - 1)
    save_file(tensors, directory / "model.safetensors")
    HeadManifest(
        head="eagle3",
        vllm_method="eagle3",
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
        target_name=target.name,
        target=target.fingerprint(),
        draft_vocab_size=DRAFT_VOCAB_SIZE,
    ).save(directory)
    return directory


def processes_of_session(session: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text()
            if entry.name.isdigit() and int(fields.rpartition(")")[2].split()[3]) == session:
                found.append(fields[:60])
        except OSError:
            continue
    return found


@contextmanager
def started(tmp_path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and its first ready line; its log is ``stderr.log``."""
    command = [*SERVE, "--set", "serve.port=0", "--set", f"serve.max_model_len={MAX_MODEL_LEN}"]
    command += ["--set", "serve.enforce_eager=true", "--set", "serve.kv_cache_gib=1"]
    command += ["--set", f"serve.startup_timeout_sec={START_SEC}", *options]
    with (tmp_path / "stderr.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield process, next_ready_line(process, tmp_path)
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()


def next_ready_line(process: subprocess.Popen[str], tmp_path: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (tmp_path / "stderr.log").read_text()[-4000:]
    return json.loads(line)


def session_of(process: subprocess.Popen[str]) -> int:
    """Of the server's processes: it bears the id of the first of them."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert any("VLLM::" in entry for entry in processes_of_session(int(child)))
    return int(child)


def assert_ends_cleanly(process: subprocess.Popen[str], session: int) -> None:
    process.send_signal(signal.SIGTERM)
    assert_ended_cleanly(process, session)


def assert_ended_cleanly(process: subprocess.Popen[str], session: int) -> None:
    assert process.wait(timeout=60) == 0
    assert process.stdout is not None
    assert process.stdout.read() == "", "only ready lines belong on standard output"
    deadline = time.monotonic() + 10
    while left := processes_of_session(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@contextmanager
def served(tmp_path: Path, *options: str) -> Iterator[dict[str, Any]]:
    """The ready line's facts; afterwards SIGTERM, and proof that the server is gone with all of its processes."""
    with started(tmp_path, *options) as (process, facts):
        session = session_of(process)
        yield facts
        assert_ends_cleanly(process, session)
        assert "Traceback" not in (tmp_path / "stderr.log").read_text()


def complete(facts: dict[str, Any], path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{facts['url']}{path}", json={"model": facts["model"], **body}, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def check_chat(facts: dict[str, Any]) -> None:
    question = [{"role": "user", "content": "Count from 1 to 9."}]
    answer = complete(facts, "/v1/chat/completions", messages=question, max_tokens=16, temperature=0.7, seed=3)
    assert answer["usage"]["completion_tokens"] > 0


def status(facts: dict[str, Any]) -> dict[str, Any]:
    return httpx.get(f"{facts['url']}/specdec/status", timeout=30, trust_env=False).json()


def metric(facts: dict[str, Any], name: str) -> float:
    text = httpx.get(f"{facts['url']}/metrics", trust_env=False).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def drafted(facts: dict[str, Any]) -> list[float]:
    """Drafts, and their tokens."""
    return [metric(facts, f"vllm:spec_decode_num_{what}_total") for what in ("drafts", "draft_tokens")]


def test_plain_server_answers_survives_a_long_seeded_prompt_and_leaves_nothing(tiny_target: Target, tmp_path: Path):
    with served(tmp_path, "--target", tiny_target.name, "--no-speculation", *TINY_OPTIONS) as facts:
        assert (facts["ready"], facts["head"], facts["num_speculative_tokens"]) == (True, None, 0)
        check_chat(facts)
        assert drafted(facts) == [0, 0]
        # More prompt tokens at once than vLLM's default step holds: prefilled in chunks, they would kill the engine.
        long_prompts = [[7 + i] * (TINY_MODEL_LEN - 8) for i in range(9)]
        answer = complete(facts, "/v1/completions", prompt=long_prompts, seed=3, temperature=0.7, max_tokens=4)
        assert len(answer["choices"]) == 9
        check_chat(facts)


def test_a_corrupt_head_is_served_plain_and_the_reason_is_said(tiny_target: Target, tmp_path: Path):
    weights = write_head(tiny_target, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = ("--target", tiny_target.name, "--head", str(tmp_path), *TINY_OPTIONS)
    with served(tmp_path, *options) as facts:
        assert (facts["mode"], facts["head"], facts["num_speculative_tokens"]) == ("plain", None, 0)
        assert "model.safetensors is truncated" in facts["reason"]
        check_chat(facts)
        assert status(facts).items() >= {"mode": "plain", "reason": facts["reason"], "head": None}.items()


def test_a_head_that_vllm_refuses_is_served_plain_and_the_reason_is_said(tiny_target: Target, tmp_path: Path):
    """Nothing is wrong with its files that can be seen without vLLM: it asks for a method that there is none of."""
    manifest = HeadManifest.load(write_head(tiny_target, tmp_path))
    manifest.vllm_method = "telepathy"
    manifest.save(tmp_path)
    options = ("--target", tiny_target.name, "--head", str(tmp_path), *TINY_OPTIONS)
    with started(tmp_path, *options) as (process, facts):
        assert facts["mode"] == "plain"
        assert facts["reason"].startswith("with speculation: vLLM did not start: ")
        check_chat(facts)
        assert status(facts).items() >= {"mode": "plain", "reason": facts["reason"]}.items()
        session = session_of(process)
        engine = engine_core(session)
        body = {"model": facts["model"], "prompt": [7] * 8, "max_tokens": 200, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{facts['url']}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(engine, signal.SIGSTOP)  # the answer has begun, and takes as long as the test wants
            goes_on = threading.Timer(2, os.kill, (engine, signal.SIGCONT))
            goes_on.start()
            process.send_signal(signal.SIGTERM)
            *_, usage, end = filter(None, lines)
        goes_on.join()
        assert end == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 200
        assert_ended_cleanly(process, session)


def engine_core(session: int) -> int:
    (entry,) = [entry for entry in processes_of_session(session) if "VLLM::EngineCor" in entry]
    return int(entry.split()[0])


def test_an_engine_that_is_killed_under_load_and_then_hangs_serves_again_at_last_plain_and_leaves_nothing(
    tiny_target: Target, tmp_path: Path
):
    head = str(write_head(tiny_target, tmp_path))
    options = ("--target", tiny_target.name, "--head", head, "--set", "serve.health_timeout_sec=5", *TINY_OPTIONS)
    with started(tmp_path, *options) as (process, facts):
        assert (facts["head"], facts["num_speculative_tokens"]) == ("eagle3", NUM_SPECULATIVE_TOKENS)
        httpx.put(f"{facts['url']}/specdec/policy", content="fixed:2", trust_env=False).raise_for_status()
        before = drafted(facts)
        check_chat(facts)
        num_drafts, num_draft_tokens = (after - b for after, b in zip(drafted(facts), before, strict=True))
        assert num_drafts > 0 and num_draft_tokens == 2 * num_drafts
        url, answers = f"{facts['url']}/v1/completions", []
        body = {"model": facts["model"], "prompt": [7] * 8, "max_tokens": 240, "ignore_eos": True, "n": 8}

        def ask() -> None:
            try:
                answers.append(httpx.post(url, json=body, timeout=120, trust_env=False).status_code)
            except httpx.HTTPError as error:
                answers.append(error)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        first = session_of(process)
        engine = engine_core(first)
        os.kill(engine, signal.SIGSTOP)
        for client in clients:
            client.start()
        time.sleep(1)  # all have asked, however slow this machine is
        os.kill(engine, signal.SIGCONT)
        time.sleep(0.1)  # none is answered, however fast it is
        os.kill(engine, signal.SIGKILL)
        for client in clients:
            client.join()
        assert len(answers) == len(clients) and set(answers) != {200}, answers
        assert not [answer for answer in answers if isinstance(answer, int) and 200 < answer < 500], answers
        again = next_ready_line(process, tmp_path)
        assert again == facts
        assert processes_of_session(first) == []
        check_chat(again)
        assert status(again).items() >= {"mode": "fixed", "policy": "fixed:2", "head": "eagle3"}.items()
        os.kill(engine_core(session_of(process)), signal.SIGSTOP)  # hangs: vLLM's own health check sees nothing
        plain = next_ready_line(process, tmp_path)
        assert (plain["url"], plain["mode"], plain["head"]) == (facts["url"], "plain", None)
        assert "failed 2 times in a row, at last: vLLM gave no healthy answer for 5 s" in plain["reason"]
        check_chat(plain)
        assert status(plain).items() >= {"mode": "plain", "reason": plain["reason"]}.items()
        second = session_of(process)
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while left := processes_of_session(second):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
