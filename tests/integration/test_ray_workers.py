"""Two real engines on a Ray cluster of this machine: every prompt is answered once, and only if it was not before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from draft_training.completions import CompletionLog
from draft_training.ray_engines import generate_with_ray
from specdec.config import TargetConfig, load_config
from specdec.record import text_sha256
from specdec.targets import resolve_target
from tests.tiny import save_tiny_target

pytestmark = pytest.mark.vllm

NUM_TOKENS = 12


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'specdec[ray]'")
    pytest.importorskip("vllm", reason="needs vLLM")
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def greedy(path: Path, prompt_ids: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = model.generate(torch.tensor([prompt_ids]), do_sample=False, max_new_tokens=NUM_TOKENS)
    return ids[0, len(prompt_ids) :].tolist()


def test_two_engines_answer_what_is_missing_exactly_once(cluster, tmp_path: Path):
    target = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path / "target"))))
    traces = load_config(
        None, ["traces.ray_engines=2", "traces.temperature=0.0", f"traces.max_new_tokens={NUM_TOKENS}"]
    ).traces
    requests = {f"prompt {i}": [256, 65 + i, 66, 67] for i in range(20)}
    path = tmp_path / "completions.jsonl"
    log = CompletionLog(path)
    with log.writing(2) as writer:  # an earlier run's
        for prompt in list(requests)[:2]:
            writer.add(prompt, requests[prompt], [1, 2, 3], "stop")

    generate_with_ray(target, "float32", traces, log.missing(requests), log)

    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(item["prompt"] for item in written) == sorted(requests)
    assert {item["conversation_id"] for item in written} == {text_sha256(prompt) for prompt in requests}
    assert [item["completion_ids"] for item in written[:2]] == [[1, 2, 3]] * 2
    assert CompletionLog(path).missing(requests) == {}
    for item in written[2:5]:
        assert item["prompt_ids"] == requests[item["prompt"]]
        assert item["completion_ids"] == greedy(target.path, item["prompt_ids"])
