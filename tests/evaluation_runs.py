"""Whole evaluations against fake servers, as the command runs them; quick where nobody looks at a plot."""

from __future__ import annotations

import json

import pytest
from fake_server import FakeServer, serving

from specdec.config import EvalConfig, RunConfig
from specdec.evaluation import measure as measuring
from specdec.evaluation.run import evaluate

PROMPTS = [f"what is question {i} of <script>alert({i})</script>?" for i in range(8)]


@pytest.fixture
def quick(request, monkeypatch):
    """Drawing takes most of the time, and the fake servers' blocks are over in a moment."""
    if "report" not in request.node.name:
        monkeypatch.setattr("specdec.evaluation.report.draw_plots", lambda result: [])
    monkeypatch.setattr(measuring, "LAG_PERIOD_SEC", 0.01)


def settings(tmp_path, servers: dict[str, FakeServer], **options) -> RunConfig:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": "4", "checker": "exact"}) + "\n" for text in PROMPTS))
    arms = [f"{name}={server.url}" for name, server in servers.items()]
    chosen = {"max_new_tokens": 12, "distribution_samples": 0, "suites": [str(path)], "arms": arms, **options}
    return RunConfig(eval=EvalConfig(**chosen))


def run(plain, spec, tmp_path, **options):
    servers = {"plain": plain, "spec": spec}
    config = settings(tmp_path, servers, **options)
    with serving(*{id(server): server for server in servers.values()}.values()):
        return evaluate(config, None, tmp_path / "out")
