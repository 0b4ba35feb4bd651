"""The monitor's metrics as a Prometheus server would scrape them, and the dashboard that asks for them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving import prometheus
from tests.fake_engine import FakeEngineClient, make_app, make_status, plain_status

DASHBOARD = Path(prometheus.__file__).with_name("grafana.json")


def scrape(app: Any) -> dict[str, float]:
    """``name{label=value}`` to value."""

    async def send() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.get("/metrics", follow_redirects=True)).text

    families = text_string_to_metric_families(asyncio.run(send()))
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_scrape_gives_the_engines_figures_of_now():
    client = FakeEngineClient(make_status())
    figures = scrape(make_app(client)[0])
    wanted = {
        "specdec:num_speculative_tokens": 3,
        "specdec:acceptance_length": 2.31,
        "specdec:tokens_per_step": 2.02,
        "specdec:sequence_steps_total": 66300,
        "specdec:conditional_rate{position=0}": 0.68,
        "specdec:trained_conditional_rate{position=3}": 0.52,
        "specdec:goodput_tok_per_sec": 61.4,
        "specdec:plain_tok_per_sec": 43.2,
        "specdec:fallback_share": 0.27,
        "specdec:alarm": 0,
        "specdec:mode{mode=speculating}": 1,
        "specdec:mode{mode=plain}": 0,
        "specdec:steps_total{k=0}": 5200,
        "specdec:drafted_tokens_total{position=3}": 7000,
        "specdec:reached_tokens_total{position=1}": 31900,
        "specdec:accepted_tokens_total{position=2}": 10500,
        "specdec:policy_failures_total": 0,
        "specdec:decode_seconds_total": 2210.5,
        "specdec:fallback_seconds_total": 596.8,
        "specdec:span_drafts_total{span=think}": 41000,
        "specdec:span_accepted_tokens_total{span=answer}": 12500,
        "specdec:position_drafts_total{output_position=1024}": 9000,
        "specdec:position_accepted_tokens_total{output_position=0}": 29400,
    }
    assert {name: figures.get(name) for name in wanted} == wanted
    assert 0 <= figures["specdec:status_age_seconds"] < 30
    assert len(client.commands) == 1


def test_alarm_and_mode_are_marks():
    figures = scrape(make_app(FakeEngineClient(make_status(alarm="drift", mode="safe")))[0])
    assert figures["specdec:alarm"] == 1
    assert [name for name, value in figures.items() if name.startswith("specdec:mode") and value] == [
        "specdec:mode{mode=safe}"
    ]


def test_what_is_unknown_has_no_sample():
    figures = scrape(make_app(FakeEngineClient(plain_status()))[0])
    assert not any(name.startswith("specdec:acceptance_length") or "_total" in name for name in figures)
    assert figures["specdec:mode{mode=plain}"] == 1


@pytest.mark.parametrize("odd", ["text", [None, "x"], {"a": None}, float("nan"), True])
def test_odd_values_never_break_the_scrape(odd):
    status = make_status(totals=odd, by_span=odd, k_histogram=odd, trained=odd, conditional_rates=odd, batch=odd)
    figures = scrape(make_app(FakeEngineClient(status))[0])
    assert figures["specdec:num_speculative_tokens"] == 3 and not any(map(math.isnan, figures.values()))
    assert not any(
        name.startswith(("specdec:steps", "specdec:span", "specdec:conditional_rate{position=}")) for name in figures
    )


def test_nothing_asks_the_engine_between_scrapes_and_close_ones_share_an_answer():
    client = FakeEngineClient(make_status())
    app, plugin = make_app(client)
    assert client.commands == []
    scrape(app)
    scrape(app)
    assert len(client.commands) == 1
    client.answer["num_speculative_tokens"] = 1
    plugin.engine.clock = lambda: time.monotonic() + 5
    assert scrape(app)["specdec:num_speculative_tokens"] == 1


def test_stuck_engine_delays_a_scrape_a_little_and_leaves_the_last_figures_with_their_age(monkeypatch):
    monkeypatch.setattr(prometheus, "SCRAPE_WAIT_SEC", 0.05)
    client = FakeEngineClient(make_status())
    app, plugin = make_app(client)
    scrape(app)
    client.trouble = "silent"
    plugin.engine.clock = lambda: time.monotonic() + 60
    figures = scrape(app)
    assert figures["specdec:num_speculative_tokens"] == 3 and figures["specdec:status_age_seconds"] >= 60


def test_before_the_first_answer_there_are_no_figures():
    client = FakeEngineClient(make_status())
    client.trouble = RuntimeError("no such method")
    assert scrape(make_app(client)[0]) == {}


def test_a_name_that_is_taken_is_noticed_at_once():
    _, plugin = make_app(FakeEngineClient(make_status()))
    with pytest.raises(ValueError, match="Duplicated"):
        plugin.registry.register(prometheus.StatusCollector(plugin.engine))


def panels(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in tree.get("panels", []):
        yield panel
        yield from panels(panel)


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:specdec|vllm):\w+", expression))


DASHBOARD_TREE = json.loads(DASHBOARD.read_text())
QUERIES = [target["expr"] for panel in panels(DASHBOARD_TREE) for target in panel.get("targets", [])]


def vllm_names() -> set[str]:
    """Every metric that vLLM defines, read from its source: importing it takes long."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM here")
    text = (Path(spec.origin).parent / "v1/metrics/loggers.py").read_text()
    return set(re.findall(r'name="(vllm:\w+)"', text))


def test_dashboard_asks_only_for_metrics_that_exist():
    app, _ = make_app(FakeEngineClient(make_status()))
    ours = {name.partition("{")[0] for name in scrape(app)}
    vllms = vllm_names()
    asked = {name for query in QUERIES for name in names_in(query)}
    asked |= {name for variable in DASHBOARD_TREE["templating"]["list"] for name in names_in(str(variable))}
    assert len(asked) > 15
    assert {name for name in asked if name.startswith("specdec:")} - ours == set()
    theirs = {re.sub(r"_(total|bucket)$", "", name) for name in asked if name.startswith("vllm:")}
    assert theirs - vllms == set()


def test_dashboard_is_whole():
    every = list(panels(DASHBOARD_TREE))
    assert len({panel["id"] for panel in every}) == len(every) > 10
    assert all(panel["title"] and panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in every)
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD_TREE["templating"]["list"]}
    assert variables == {"datasource": "datasource", "instance": "query"}
    sources = [target["datasource"]["uid"] for panel in every for target in panel.get("targets", [])]
    assert set(sources) == {"${datasource}"} and len(sources) == len(QUERIES)


def test_dashboards_counters_are_rates_and_its_gauges_are_not():
    for query in QUERIES:
        rated = set(re.findall(r"(?:rate|increase)\(([\w:]+)", query))
        assert rated == {name for name in names_in(query) if name.endswith(("_total", "_bucket"))}, query


def test_dashboards_panels_do_not_overlap():
    taken: dict[tuple[int, int], str] = {}
    for panel in panels(DASHBOARD_TREE):
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
