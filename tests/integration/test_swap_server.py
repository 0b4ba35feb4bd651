"""A head swapped in a server that runs: none of its requests notices but by its speed.

After a swap the server must accept exactly what the reference decoder accepts with the new head's weights, at each
position; and after a bad head has been taken back, what it accepts with the old one's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from draft_training.reference import speculative_decode
from specdec.cli import app
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts
from tests.integration.test_four_heads import (
    NEW_TOKENS,
    Workplace,
    complete,
    make_workplace,
    served,
    served_acceptance,
    trained_head,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    pytest.importorskip("vllm", reason="needs vLLM")
    return make_workplace(tmp_path_factory.mktemp("llama"), "llama")  # test_four_heads has qwen2


def write_noise(head: Any, manifest: HeadManifest, directory: Path, seed: int) -> Path:
    """A head of the same shape that knows nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    head.export(directory, torch.bfloat16)
    manifest.save(directory)
    return directory


def reference(place: Workplace, head: Any) -> tuple[int, list[int]]:
    counts = AcceptanceCounts()
    for ids in place.prompts:
        counts = counts + speculative_decode(place.model, head, ids, NEW_TOKENS).counts
    return counts.num_drafts, counts.num_accepted_per_pos


def accepted_now(place: Workplace, facts: dict[str, Any]) -> tuple[int, list[int]]:
    """What the server accepts on all prompts, whose outputs must be the target's own."""
    drafts, by_position = served_acceptance(facts)
    assert [complete(facts, ids) for ids in place.prompts] == place.greedy
    drafts_after, by_position_after = served_acceptance(facts)
    return drafts_after - drafts, [after - before for after, before in zip(by_position_after, by_position, strict=True)]


@contextmanager
def traffic(place: Workplace, facts: dict[str, Any]) -> Iterator[list[bool]]:
    """Clients that ask all the while; each answer's equality with plain decode is noted."""
    answers: list[bool] = []
    done = threading.Event()

    def ask(number: int) -> None:
        while not done.is_set():
            answers.append(complete(facts, place.prompts[number]) == place.greedy[number])

    def asking(number: int) -> None:
        try:
            ask(number)
        except Exception:
            answers.append(False)

    clients = [threading.Thread(target=asking, args=(number,)) for number in range(3)]
    for client in clients:
        client.start()
    try:
        time.sleep(0.2)
        yield answers
        time.sleep(0.2)
    finally:
        done.set()
        for client in clients:
            client.join()


def status_of(facts: dict[str, Any]) -> dict[str, Any]:
    return httpx.get(f"{facts['url']}/specdec/status", timeout=30, trust_env=False).json()


def swap(facts: dict[str, Any], directory: Path) -> Any:
    return CliRunner().invoke(app, ["swap", str(directory), "--url", facts["url"]])


@pytest.mark.parametrize("name", ["eagle3", "medusa"])  # one of each of vLLM's proposers that hold a head
def test_a_better_head_stays_a_worse_one_is_taken_back_and_a_broken_one_never_drafts(
    place: Workplace, name: str, tmp_path: Path
):
    good_dir = tmp_path / "good"
    head = trained_head(place, name, good_dir)
    wanted = reference(place, head)
    manifest = HeadManifest.load(good_dir)
    first, bad = (write_noise(head, manifest, tmp_path / f"noise{seed}", seed) for seed in range(2))
    options = ("--target", str(place.files.path), "--head", str(first), "--policy", "fixed:3")
    with served(tmp_path, *options) as facts:
        before = accepted_now(place, facts)
        with traffic(place, facts) as answers:
            done = swap(facts, good_dir)
        assert done.exit_code == 0, (done.output, done.exception)
        assert len(answers) >= 3 and all(answers), answers
        status = status_of(facts)
        assert (status["head"], status["head_dir"]) == (name, str(good_dir))
        assert status["swap"]["state"] in ("watched", "kept"), status["swap"]
        assert accepted_now(place, facts) == wanted and sum(wanted[1]) > sum(before[1])

        weights = bad / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-10])
        refused = swap(facts, bad)
        assert refused.exit_code != 0 and "truncated" in str(refused.exception), refused.exception
        assert accepted_now(place, facts) == wanted
        weights.write_bytes(whole)

        with traffic(place, facts) as answers:
            assert swap(facts, bad).exit_code == 0
            deadline = time.monotonic() + 30
            while (last := status_of(facts)["swap"])["state"] == "watched" and time.monotonic() < deadline:
                time.sleep(0.1)
        assert all(answers), answers
        assert (last["state"], last["to"], last["from"]) == ("taken back", str(bad), str(good_dir)), last
        assert "the acceptance length fell from" in last["reason"]
        status = status_of(facts)
        assert status["head_dir"] == str(good_dir) and status["events"][-1]["kind"] == "head"
        assert accepted_now(place, facts) == wanted
    assert "is taken back for" in (tmp_path / "stderr.log").read_text()
