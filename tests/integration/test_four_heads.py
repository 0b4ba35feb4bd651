"""Every architecture, trained for a moment, served by real vLLM: as lossless, and as good, as in torch.

The reference decoder and the server draft for the same prompts with the same weights. Both must put out the target's
own tokens, and accept the same number of drafts at each position.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from draft_training.features import FeatureStore
from draft_training.heads import list_heads, load_head
from draft_training.recipe import Objective
from draft_training.reference import greedy_decode, speculative_decode
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts
from specdec.targets import Target, resolve_target
from specdec.traces import prompt_ids, row_from_ids
from tests.tiny import save_tiny_target, tiny_tokenizer

pytestmark = pytest.mark.vllm

K = 3
NEW_TOKENS = 40
PROMPTS = [f"What is {i} plus {i + 7}?" for i in range(8)]
NUM_TRAINED = 5  # of the prompts; the rest is new to the head
SETTINGS = (
    "target.dtype=float32", "serve.port=0", "serve.enforce_eager=true", "serve.max_model_len=256",
    "serve.kv_cache_gib=1", "serve.max_num_seqs=4", f"serve.policy=fixed:{K}",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """A tiny target and what it says by itself in torch."""

    files: Target
    model: TargetModel
    prompts: list[list[int]]
    rows: list[Any]
    greedy: list[list[int]]


def make_workplace(folder: Path, kind: str, initializer_range: float = 0.15) -> Workplace:
    """``initializer_range``: so large that outputs vary, so small that a head can learn them."""
    path = save_tiny_target(folder / "target", kind, initializer_range)
    files = resolve_target(TargetConfig(name=str(path)))
    model = TargetModel.load(files, "float32", Device(kind="cpu", core_ids=(0,), native_bf16=False))
    tokenizer = tiny_tokenizer()
    prompts = [prompt_ids(tokenizer, text) for text in PROMPTS]
    greedy = [greedy_decode(model, ids, NEW_TOKENS) for ids in prompts]
    rows = [row_from_ids(tokenizer, *each) for each in zip(PROMPTS, prompts, greedy, strict=True)]
    return Workplace(files=files, model=model, prompts=prompts, rows=rows, greedy=greedy)


TARGETS = {"eagle3": ("r1-qwen-1.5b", 0.1), "eagle": ("r1-qwen-7b", 0.1), "medusa": ("r1-llama-8b", 0.125)}


@pytest.fixture
def workplace(name: str, options: dict[str, Any], tmp_path: Path) -> Workplace:
    pytest.importorskip("vllm", reason="needs vLLM")
    narrow = ("qwen2",)  # test_swap_server has llama
    return make_workplace(tmp_path, *(narrow if options else TARGETS.get(name, narrow)))


@contextmanager
def served(folder: Path, *options: str, vllm: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The ready line's facts of a server that ends with the block; ``vllm``: flags that are vLLM's own."""
    log = folder / "stderr.log"
    command = [sys.executable, "-m", "specdec", "serve", *options, *(f"--set={item}" for item in SETTINGS)]
    command += ["--", *vllm] if vllm else []
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()[-4000:]
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def complete(facts: dict[str, Any], ids: list[int]) -> list[int]:
    body = {
        "model": facts["model"], "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    response = httpx.post(f"{facts['url']}/v1/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def served_acceptance(facts: dict[str, Any]) -> tuple[int, list[int]]:
    """Drafts, and accepted tokens by position, of everything the server has done."""
    text = httpx.get(f"{facts['url']}/metrics", timeout=30, trust_env=False).text
    found = re.findall(
        r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)".*\} (\S+)$', text, re.M
    )
    [drafts] = re.findall(r"^vllm:spec_decode_num_drafts_total\{.*\} (\S+)$", text, re.M)
    by_position = {int(position): round(float(value)) for position, value in found}
    return round(float(drafts)), [by_position[position] for position in range(K)]


def trained_head(place: Workplace, name: str, directory: Path, **chosen: Any) -> Any:
    """A head that is right sometimes, with exactly the weights that it was exported with."""
    spec = load_head(name)
    options = spec.options_cls(**chosen)
    if hasattr(options, "draft_vocab_size"):
        options.draft_vocab_size = 250  # truncated, so that the map to target ids matters
    vocab_size = int(place.model.config.vocab_size)
    torch.manual_seed(1)
    ids = torch.randperm(vocab_size)[: spec.draft_vocab_size(options, vocab_size, Counter())].sort().values
    head = spec.build(place.model, ids, options, K)
    batch = FeatureStore(place.model, place.rows, head.aux_layer_ids, 2**30).batch(list(range(NUM_TRAINED)))
    width = place.files.config["hidden_size"]
    optimizer = torch.optim.AdamW(head.parameter_groups(5e-3 * (64 / width) ** 0.5, 1.0, 0.0))
    for _ in range(80):
        head.compute_loss(batch, Objective()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter.bfloat16().float())
    head.export(directory, torch.bfloat16)
    HeadManifest(
        head=spec.name,
        vllm_method=spec.vllm_method,
        vllm_speculative=spec.vllm_speculative,
        num_speculative_tokens=K,
        target_name=place.files.name,
        target=place.files.fingerprint(),
        draft_vocab_size=head.draft_vocab_size,
    ).save(directory)
    return head


def assert_no_failure(facts: dict[str, Any]) -> None:
    """Whether the policy still decides: what fails in it leaves K fixed, and shows here alone."""
    status = httpx.get(f"{facts['url']}/specdec/status", timeout=30, trust_env=False).json()
    assert (status["mode"] != "safe", status["totals"]["policy_failures"]) == (True, 0), status["reason"]


# vLLM loads an output layer for each of Medusa's heads in another way than one for all.
CASES = [*((name, {}) for name in list_heads()), ("medusa", {"lm_head": "own"})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_server_accepts_what_the_reference_decoder_accepts(
    workplace: Workplace, name: str, options: dict[str, Any], tmp_path: Path
):
    head = trained_head(workplace, name, tmp_path / "head", **options)
    wanted = AcceptanceCounts()
    for ids, greedy in zip(workplace.prompts, workplace.greedy, strict=True):
        decoded = speculative_decode(workplace.model, head, ids, NEW_TOKENS)
        assert decoded.output_ids == greedy
        wanted = wanted + decoded.counts
    assert 0 < wanted.num_accepted_tokens < wanted.num_draft_tokens, "all or nothing was accepted: nothing is compared"
    with served(tmp_path, "--target", str(workplace.files.path), "--head", str(tmp_path / "head")) as facts:
        assert (facts["head"], facts["num_speculative_tokens"]) == (name, K)
        assert [complete(facts, ids) for ids in workplace.prompts] == workplace.greedy
        assert served_acceptance(facts) == (wanted.num_drafts, wanted.num_accepted_per_pos)
        for policy in ("fixed:0", "fixed:1", "fixed:2", "auto"):
            changed = httpx.put(f"{facts['url']}/specdec/policy", json={"policy": policy}, timeout=30, trust_env=False)
            assert changed.status_code == 200, changed.text
            assert [complete(facts, ids) for ids in workplace.prompts[:3]] == workplace.greedy[:3], policy
        assert_no_failure(facts)
