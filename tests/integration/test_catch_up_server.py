"""Plain decode in a real server with a head: the head rests, and afterwards drafts what it would have drafted."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_four_heads import (
    NEW_TOKENS,
    Workplace,
    assert_no_failure,
    complete,
    make_workplace,
    served,
    served_acceptance,
    trained_head,
)

pytestmark = pytest.mark.vllm

BY_THE_CLOCK = ("--scheduler-cls", "experiments.plain_tax.alternating.alternating")
EVERY_STEP = ("--worker-extension-cls", "experiments.plain_tax.every_step.Worker")
COUNTING = ("--worker-extension-cls", "tests.integration.head_calls.Worker")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    pytest.importorskip("vllm", reason="needs vLLM")
    return make_workplace(tmp_path_factory.mktemp("catch_up"), "llama")


def ask_all(place: Workplace, facts: dict[str, Any]) -> tuple[int, list[int]]:
    """Drafts and accepted tokens by position, of twice all prompts, one after the other."""
    assert [complete(facts, ids) for ids in place.prompts * 2] == place.greedy * 2
    return served_acceptance(facts)


def test_prompts_that_fill_a_step_while_the_head_rests_harm_nothing(place: Workplace, tmp_path: Path):
    """What the head has put off and a full step's prompt do not fit its buffers together."""
    trained_head(place, "eagle3", tmp_path / "head")
    options = ("--target", str(place.files.path), "--head", str(tmp_path / "head"), "--policy", "off")
    chunked = ("--enable-chunked-prefill", "--max-num-batched-tokens", "32")
    with served(tmp_path, *options, vllm=chunked) as facts, ThreadPoolExecutor() as pool:
        url, body = f"{facts['url']}/v1/completions", {"model": facts["model"], "ignore_eos": True}

        def ask(length: int, tokens: int, **more: Any) -> int:
            asked = {**body, "prompt": [7 + length] * length, "max_tokens": tokens, **more}
            return httpx.post(url, json=asked, timeout=120, trust_env=False).status_code

        running = pool.submit(ask, 4, 200)
        # Seeded: vLLM winds a request's generator back after each chunk of its prompt, which CPU generators can't.
        answers = [ask(length, 2, seed=1, temperature=0.7) for length in range(150, 170)]
        assert [*answers, running.result()] == [200] * 21, (tmp_path / "stderr.log").read_text()[-3000:]
        assert complete(facts, place.prompts[0]) == place.greedy[0]
        assert_no_failure(facts)


def test_the_head_rests_and_then_drafts_as_if_it_had_not(place: Workplace, tmp_path: Path, monkeypatch):
    """40 plain steps and 24 drafting ones in turn, against vLLM's own way: the head runs in every step."""
    trained_head(place, "eagle3", tmp_path / "head")
    calls = tmp_path / "calls"
    monkeypatch.setenv("HEAD_CALLS", str(calls))
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))  # for the workers' classes
    options = ("--target", str(place.files.path), "--head", str(tmp_path / "head"), "--policy", "auto")
    counts = {}
    for name, flags in (("rests", COUNTING), ("runs", EVERY_STEP)):
        with served(tmp_path, *options, vllm=(*BY_THE_CLOCK, *flags)) as facts:
            counts[name] = ask_all(place, facts)
            steps = httpx.get(f"{facts['url']}/specdec/status", timeout=30, trust_env=False).json()["k_histogram"]
    # Equal where this was written; elsewhere the sums of one long forward may round another way than those of many.
    (drafts, accepted), (drafts_running, accepted_running) = counts["rests"], counts["runs"]
    assert drafts == pytest.approx(drafts_running, rel=0.1) and accepted[0] > 20
    assert accepted[0] / drafts == pytest.approx(accepted_running[0] / drafts_running, abs=0.05), counts
    length, length_running = 1 + sum(accepted) / drafts, 1 + sum(accepted_running) / drafts_running
    assert length == pytest.approx(length_running, rel=0.05), counts
    num_plain_calls = calls.read_text().split().count("0")
    # Prompts are read at once, and so are steps that verified drafts of the step before.
    assert steps["0"] > 5 * NEW_TOKENS and num_plain_calls < steps["0"] / 4, (num_plain_calls, steps)
