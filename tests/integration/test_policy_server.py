"""Real vLLM while K changes under its requests: whatever the policy does, the target's own tokens come out. And what a
client sees when the engine dies. n-grams as drafts: they need no head, and they are not always found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_serve import (
    assert_ends_cleanly,
    engine_core,
    next_ready_line,
    processes_of_session,
    session_of,
    started,
)
from tests.tiny import save_tiny_target

pytestmark = pytest.mark.vllm

K = 3
LOOKUP = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KINDS = ({}, {"temperature": 0.4, "top_p": 0.95, "seed": 11})  # greedy, and sampled with a seed
PROMPTS = [[7 + i, 40 + i, 3 * i + 1, 50, 60, 70, 80 + i] * 2 for i in range(6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], Path]]:
    pytest.importorskip("vllm", reason="needs vLLM")
    folder = tmp_path_factory.mktemp("lookup")
    target = save_tiny_target(folder / "target", initializer_range=0.15)  # its outputs loop
    options = ("--target", str(target), "--policy", "auto", "--set", "serve.max_model_len=256", "--")
    with started(folder, *options, "--speculative-config", json.dumps(LOOKUP)) as (process, facts):
        yield process, facts, folder


class Client:
    """Completions and the monitor of one server."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts, self.http = facts, httpx.Client(trust_env=False, timeout=120, base_url=facts["url"])

    def body(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        greedy = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 60, "return_token_ids": True}
        return {"model": self.facts["model"], "prompt": prompt, **greedy, **more}

    def complete(self, prompt: list[int], **more: Any) -> list[int]:
        response = self.http.post("/v1/completions", json=self.body(prompt, **more))
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["token_ids"]

    def set_policy(self, policy: str) -> None:
        assert self.http.put("/specdec/policy", json={"policy": policy}).status_code == 200

    def status(self) -> dict[str, Any]:
        return self.http.get("/specdec/status").json()


def test_k_may_change_at_any_step_and_for_any_request(server):
    client = Client(server[1])
    client.set_policy("off")
    plain = [[client.complete(prompt, **kind) for kind in KINDS] for prompt in PROMPTS]
    assert all(greedy != sampled for greedy, sampled in plain)
    assert client.status()["totals"]["num_drafts"] == 0
    is_over = threading.Event()

    def change() -> None:
        while not is_over.is_set():
            for policy in ("fixed:3", "fixed:0", "fixed:1", "off", "fixed:2", "auto"):
                client.http.put("/specdec/policy", json={"policy": policy})
                time.sleep(0.02)

    def ask(number: int) -> bool:
        wish = {"vllm_xargs": {"specdec": ("off", "auto", 1, 2)[number % 4]}} if number % 3 == 0 else {}
        kind = number // 6 % 2
        return client.complete(PROMPTS[number % 6], **KINDS[kind], **wish) == plain[number % 6][kind]

    def has_seen_all() -> bool:
        return {"0", "1", "2", "3"} <= set(client.status()["k_histogram"])

    with ThreadPoolExecutor(5) as pool:
        changes = pool.submit(change)
        give_up_sec = time.monotonic() + 60
        try:
            same = list(pool.map(ask, range(24)))
            while not has_seen_all() and time.monotonic() < give_up_sec:  # a K may fall between a slow machine's steps
                same += pool.map(ask, range(24))
        finally:
            is_over.set()
        changes.result()
    assert all(same), same
    assert has_seen_all()
    status = client.status()
    assert status["totals"]["num_accepted_tokens"] > 0
    assert status["totals"]["policy_failures"] == 0 and status["mode"] != "safe"


def test_the_policy_learns_from_drafts_that_are_not_always_found(server):
    client = Client(server[1])
    client.set_policy("auto")
    for prompt in PROMPTS:
        client.complete(prompt, max_tokens=200)
    status = client.status()
    assert status["plain_tok_per_sec"] > 0 and status["reason"] is not None


def test_clients_in_flight_when_the_engine_dies_are_told_and_the_next_ones_served(server):
    process, facts, folder = server
    client = Client(facts)
    expected = client.complete(PROMPTS[0])
    client.set_policy("off")  # a token a step: the longest way to go
    first, has_begun = session_of(process), threading.Barrier(5)
    long = client.body(PROMPTS[0], temperature=0.7, max_tokens=240, return_token_ids=False)

    def stream() -> list[str]:
        with client.http.stream("POST", "/v1/completions", json={**long, "stream": True}) as answer:
            lines = answer.iter_lines()
            seen = [next(lines)]
            has_begun.wait(60)
            return [*seen, *filter(None, lines)]

    engine = engine_core(first)
    with ThreadPoolExecutor(5) as pool:
        os.kill(engine, signal.SIGSTOP)
        streams = [pool.submit(stream) for _ in range(4)]
        time.sleep(1)  # all four have asked, so they begin in the same step, however slow this machine is
        os.kill(engine, signal.SIGCONT)
        has_begun.wait(60)
        os.kill(engine, signal.SIGSTOP)
        whole = pool.submit(client.http.post, "/v1/completions", json={**long, "n": 2})
        time.sleep(1)  # asked, and answered by nobody
        os.kill(engine, signal.SIGKILL)
        for each in streams:
            *_, error, last = each.result(60)
            assert last == "data: [DONE]" and json.loads(error.removeprefix("data: "))["error"]["code"] == 500
        assert whole.result(60).status_code == 500
    assert next_ready_line(process, folder) == facts
    assert processes_of_session(first) == []
    assert client.complete(PROMPTS[0]) == expected
    assert_ends_cleanly(process, session_of(process))
