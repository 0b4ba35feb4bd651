"""``specdec serve`` with real vLLM on the embedded target: plain, then with an untrained EAGLE-3 head.

An untrained head proposes nonsense, which the target rejects: enough to see that heads load, draft and verify.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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

pytestmark = pytest.mark.vllm

MAX_MODEL_LEN = 768
START_SEC = 300.0
SERVE = [sys.executable, "-m", "specdec", "serve"]
DRAFT_VOCAB_SIZE = 256
NUM_SPECULATIVE_TOKENS = 3


@pytest.fixture(scope="module")
def target() -> Target:
    pytest.importorskip("vllm", reason="needs vLLM")
    return resolve_target(TargetConfig())


@pytest.fixture(scope="module")
def head_dir(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE-3 head with random weights for ``target``."""
    import torch
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("head")
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
        "eagle_aux_hidden_state_layer_ids": [2, num_layers // 2, num_layers - 3],
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
    tensors["d2t"] = torch.arange(DRAFT_VOCAB_SIZE) * (vocab // DRAFT_VOCAB_SIZE - 1)  # offsets, not ids
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
def served(tmp_path: Path, *options: str) -> Iterator[dict[str, Any]]:
    """The ready line's facts; afterwards SIGTERM, and proof that the server is gone with all of its processes."""
    command = [*SERVE, *options, "--set", "serve.port=0"]
    command += ["--set", f"serve.max_model_len={MAX_MODEL_LEN}", "--set", "serve.enforce_eager=true"]
    command += ["--set", "serve.kv_cache_gib=1", "--set", f"serve.startup_timeout_sec={START_SEC}"]
    log = (tmp_path / "stderr.log").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / "stderr.log").read_text()[-4000:]
        facts = json.loads(line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        sessions = [int(child) for child in children]  # the server's session bears its first process's id
        assert len(sessions) == 1
        assert any("VLLM::" in entry for entry in processes_of_session(sessions[0]))
        yield facts
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read() == "", "only the ready line belongs on standard output"
        assert "Traceback" not in (tmp_path / "stderr.log").read_text()
        deadline = time.monotonic() + 10
        while left := processes_of_session(sessions[0]):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def complete(facts: dict[str, Any], path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{facts['url']}{path}", json={"model": facts["model"], **body}, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


def check_chat(facts: dict[str, Any]) -> None:
    question = [{"role": "user", "content": "Count from 1 to 9."}]
    answer = complete(facts, "/v1/chat/completions", messages=question, max_tokens=16, temperature=0.7, seed=3)
    assert answer["usage"]["completion_tokens"] > 0


def metric(facts: dict[str, Any], name: str) -> float:
    text = httpx.get(f"{facts['url']}/metrics", trust_env=False).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def test_plain_server_answers_survives_a_long_seeded_prompt_and_leaves_nothing(target: Target, tmp_path: Path):
    with served(tmp_path, "--target", target.name, "--no-speculation") as facts:
        assert (facts["ready"], facts["head"], facts["num_speculative_tokens"]) == (True, None, 0)
        check_chat(facts)
        assert metric(facts, "vllm:spec_decode_num_drafts_total") == 0
        # More prompt tokens at once than vLLM's default step holds: prefilled in chunks, they would kill the engine.
        long_prompts = [[7 + i] * (MAX_MODEL_LEN - 8) for i in range(3)]
        answer = complete(facts, "/v1/completions", prompt=long_prompts, seed=3, temperature=0.7, max_tokens=4)
        assert len(answer["choices"]) == 3
        check_chat(facts)


def test_eagle3_head_drafts_and_leaves_nothing(target: Target, head_dir: Path, tmp_path: Path):
    with served(tmp_path, "--target", target.name, "--head", str(head_dir)) as facts:
        assert (facts["head"], facts["num_speculative_tokens"]) == ("eagle3", NUM_SPECULATIVE_TOKENS)
        check_chat(facts)
        num_drafts = metric(facts, "vllm:spec_decode_num_drafts_total")
        assert num_drafts > 0
        assert metric(facts, "vllm:spec_decode_num_draft_tokens_total") == num_drafts * NUM_SPECULATIVE_TOKENS
