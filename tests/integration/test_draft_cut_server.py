"""Drafts that are cut by the head's confidence, in real vLLM: the same answers, of fewer rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from specdec.evaluation.acceptance import parse_acceptance
from tests.integration.test_four_heads import (
    K,
    Workplace,
    assert_no_failure,
    complete,
    make_workplace,
    served,
    trained_head,
)

pytestmark = pytest.mark.vllm

DEAR = ("--scheduler-cls", "tests.integration.dear_rows.dear")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    pytest.importorskip("vllm", reason="needs vLLM")
    return make_workplace(tmp_path_factory.mktemp("cut"), "llama")


def test_unlikely_drafts_are_not_verified_and_the_answers_are_the_same(place: Workplace, tmp_path: Path):
    trained_head(place, "eagle3", tmp_path / "head")
    options = ("--target", str(place.files.path), "--head", str(tmp_path / "head"))
    with served(tmp_path, *options, vllm=DEAR) as facts, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda ids: complete(facts, ids), place.prompts * 3))
        assert answers == place.greedy * 3
        counts = parse_acceptance(httpx.get(f"{facts['url']}/metrics", timeout=30, trust_env=False).text)
        status = httpx.get(f"{facts['url']}/specdec/status", timeout=30, trust_env=False).json()
        assert_no_failure(facts)
    assert counts.num_accepted_tokens > 20
    assert counts.num_draft_tokens < 0.8 * K * status["totals"]["num_sequence_steps"], "some drafts are cut"
    assert 0 < status["totals"]["num_drafts"] < counts.num_drafts / 4, "acceptance is of whole drafts alone"
