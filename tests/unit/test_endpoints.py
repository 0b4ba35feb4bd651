"""The monitor's HTTP side, as vLLM would run it, against an engine that answers, refuses, stalls or is dead."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import endpoints
from serving.endpoints import SpecdecEndpoints, live_page, read_policy
from serving.engine_status import KEYS, EngineStatus, EngineUnavailableError, read_facts
from serving.kept_policy import VARIABLE, kept_policy
from tests.fake_engine import FakeEngineClient, make_app, make_status, plain_status


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def message(response: httpx.Response) -> str:
    """The text of an error in OpenAI's shape, whose code is the response's."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == response.status_code
    return error["message"]


def test_status_is_the_engines():
    status = make_status()
    app, _ = make_app(FakeEngineClient(status))
    response = ask(app, "GET", "/specdec/status")
    assert response.json() == status and response.headers["cache-control"] == "no-store"


def test_launchers_facts_fill_what_the_engine_does_not_know(monkeypatch):
    facts = {"head": "eagle3", "target": "smollm2-135m", "reason": "the head is damaged", "mode": "off", "extra": 1}
    monkeypatch.setenv("SPECDEC_STATUS", json.dumps(facts))
    app, _ = make_app(FakeEngineClient(plain_status(target="the engine's own")))
    status = ask(app, "GET", "/specdec/status").json()
    assert (status["head"], status["target"]) == ("eagle3", "the engine's own")
    assert (status["reason"], status["mode"]) == ("the head is damaged", "plain")


def test_every_status_has_every_key_that_tools_read():
    app, _ = make_app(FakeEngineClient({"mode": "fixed", "num_speculative_tokens": 3}))
    status = ask(app, "GET", "/specdec/status").json()
    assert set(KEYS) <= set(status) and (status["mode"], status["acceptance_length"]) == ("fixed", None)
    assert status["uptime_sec"] >= 0  # the web server's, where the engine does not say


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null"])
def test_facts_that_are_none_are_left_out(text):
    assert read_facts(text) == {}


def test_policy_is_read_and_set():
    client = FakeEngineClient(make_status())
    app, _ = make_app(client)
    assert ask(app, "GET", "/specdec/policy").json() == {"policy": "auto"}
    response = ask(app, "PUT", "/specdec/policy", json={"policy": "fixed:2"})
    assert (response.status_code, response.json()) == (200, {"policy": "fixed:2"})
    assert client.commands[-1] == {"command": "policy", "policy": "fixed:2"}
    assert ask(app, "GET", "/specdec/policy").json() == {"policy": "fixed:2"}


def test_only_a_policy_that_was_set_is_kept_for_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "policy"))
    app, _ = make_app(FakeEngineClient(make_status()))
    assert ask(app, "PUT", "/specdec/policy", content="fixed:99").status_code == 400 and kept_policy() is None
    assert ask(app, "PUT", "/specdec/policy", content="off").status_code == 200 and kept_policy() == "off"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "policy" / "below"))  # below a file nothing can be written
    assert ask(app, "PUT", "/specdec/policy", content="auto").json() == {"policy": "auto"} and kept_policy() is None


@pytest.mark.parametrize("body", [b"off", b" off\n", b'"off"', b'{"policy": "off"}'])
def test_policy_is_taken_in_every_spelling(body):
    client = FakeEngineClient(make_status())
    assert ask(make_app(client)[0], "PUT", "/specdec/policy", content=body).json() == {"policy": "off"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"fast", "must be auto, off or fixed:K"),
        (b"", "must be auto, off or fixed:K"),
        (b"fixed:-1", "must be auto, off or fixed:K"),
        (b"fixed:9", "more draft tokens than this server's 4"),
        (b'{"policy": 3}', 'send {"policy": "auto"}'),
        (b'{"police": "off"}', 'send {"policy": "auto"}'),
        (b'{"policy"', 'send {"policy": "auto"}'),
        (b"[" * 900, 'send {"policy": "auto"}'),
        (b"\xff\xfe", "must be auto, off or fixed:K"),
        (b"a" * 2000, "not more than 1000 bytes"),
    ],
)
def test_bad_policy_is_refused_and_never_reaches_the_engine(body, says):
    client = FakeEngineClient(make_status())
    response = ask(make_app(client)[0], "PUT", "/specdec/policy", content=body)
    assert response.status_code == 400 and says in message(response)
    assert all(command["command"] == "status" for command in client.commands)


def test_policy_that_the_engine_refuses_is_a_bad_request():
    class Refusing(FakeEngineClient):
        async def call_utility_async(self, method: str, command_json: str) -> str:
            refused = json.loads(command_json)["command"] == "policy"
            return json.dumps({"error": "not with this head"} if refused else self.answer)

    response = ask(make_app(Refusing(make_status()))[0], "PUT", "/specdec/policy", content=b"off")
    assert (response.status_code, message(response)) == (400, "not with this head")


@pytest.mark.parametrize("reason", ["speculation is off: no head", None])
def test_server_without_a_policy_has_none_to_set(reason):
    client = FakeEngineClient(plain_status(reason=reason))
    response = ask(make_app(client)[0], "PUT", "/specdec/policy", content=b"off")
    assert response.status_code == 409 and (reason or "K is static") in message(response)
    assert client.answer["policy"] is None


def test_setting_the_policy_needs_vllms_api_key():
    app, _ = make_app(FakeEngineClient(make_status()), api_key=["first", "second"])
    for headers in (
        {},
        {"Authorization": "Bearer third"},
        {"Authorization": "Basic second"},
        {"Authorization": "Bearer "},
    ):
        response = ask(app, "PUT", "/specdec/policy", content=b"off", headers=headers)
        assert response.status_code == 401 and "API key" in message(response)
    given = {"Authorization": "Bearer second"}
    assert ask(app, "PUT", "/specdec/policy", content=b"off", headers=given).status_code == 200


def test_api_key_of_the_environment_counts_as_vllms_does(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    app, _ = make_app(FakeEngineClient(make_status()))
    assert ask(app, "PUT", "/specdec/policy", content=b"off").status_code == 401


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations", "/tokenize"])
def test_no_request_gets_past_the_guard_without_the_key(path):
    app, _ = make_app(FakeEngineClient(make_status()), api_key=["secret"])
    app.add_api_route("/invocations", lambda: {}, methods=["POST"])
    app.add_api_route("/tokenize", lambda: {}, methods=["POST"])
    assert "API key" in message(ask(app, "POST", path, json={}))
    assert ask(app, "POST", path, json={}, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_requests_are_guarded(monkeypatch):
    monkeypatch.setenv("SPECDEC_MAX_REQUEST_BYTES", "200")
    monkeypatch.setenv("SPECDEC_STATUS", json.dumps({"max_speculative_tokens": 3}))
    app, _ = make_app(FakeEngineClient(make_status()))
    answers = [
        ask(app, "POST", "/v1/completions", json={"prompt": "a" * size, "vllm_xargs": {"specdec": wish}})
        for size, wish in ((1, 3), (1, 4), (1, "fast"), (300, 3))
    ]
    assert [answer.status_code for answer in answers] == [200, 400, 400, 413]
    assert "0 to 3" in message(answers[1])


def test_a_server_that_came_up_plain_takes_wishes_that_speculation_would_have_met(monkeypatch):
    monkeypatch.setenv("SPECDEC_STATUS", json.dumps({"max_speculative_tokens": 0}))
    app, _ = make_app(FakeEngineClient(plain_status()))
    assert ask(app, "POST", "/v1/completions", json={"vllm_xargs": {"specdec": 2}}).status_code == 200


REQUESTS = [("GET", "/specdec/status"), ("GET", "/specdec/policy"), ("PUT", "/specdec/policy")]


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_engine_that_fails_is_a_503_with_the_reason(method, path):
    client = FakeEngineClient(make_status())
    app, _ = make_app(client)
    client.trouble = RuntimeError("Call to specdec method failed: no such method")
    response = ask(app, method, path, content=b"off")
    assert response.status_code == 503 and "no such method" in message(response)


def test_figures_that_are_no_numbers_are_null():
    app, _ = make_app(FakeEngineClient(make_status(acceptance_length=float("nan"), batch=float("inf"))))
    status = ask(app, "GET", "/specdec/status").json()
    assert (status["acceptance_length"], status["batch"]) == (None, None)


def test_dead_engine_is_not_asked():
    client = FakeEngineClient(make_status())
    app, _ = make_app(client)
    client.errored = True
    response = ask(app, "GET", "/specdec/status")
    assert response.status_code == 503 and "dead" in message(response) and client.commands == []


@pytest.mark.parametrize("answer", ["nonsense", "[1, 2]", "null", '{"error": "no monitor here"}'])
def test_answer_that_is_no_status_is_a_503(answer):
    class Odd(FakeEngineClient):
        async def call_utility_async(self, method: str, command_json: str) -> str:
            return answer

    assert ask(make_app(Odd({}))[0], "GET", "/specdec/status").status_code == 503


def test_before_the_engine_is_there_it_is_a_503():
    from fastapi import FastAPI

    app = FastAPI()
    SpecdecEndpoints().attach_router(app)
    assert "starting" in message(ask(app, "GET", "/specdec/status"))


def test_liveness_is_the_engines_answer_and_a_late_one_counts(monkeypatch):
    monkeypatch.setattr(endpoints, "LIVE_ANSWER_SEC", 0.1)
    client = FakeEngineClient(make_status())
    app, plugin = make_app(client)
    assert ask(app, "GET", "/specdec/live").json() == {"live": True}
    plugin.engine._latest_sec -= endpoints.LIVE_SEC + 1
    client.trouble = "silent"
    assert "did not answer within 0.1 s" in message(ask(app, "GET", "/specdec/live"))
    plugin.engine._latest_sec += endpoints.LIVE_SEC
    assert ask(app, "GET", "/specdec/live").status_code == 200


def test_silent_engine_is_given_up_and_asked_once():
    """Questions must not pile up in front of an engine that is stuck; and when it goes on, it is heard again."""

    async def run() -> None:
        client = FakeEngineClient(make_status())
        go_on = asyncio.Event()
        asked = []
        answers = client.call_utility_async

        async def stuck(method: str, command_json: str) -> str:
            asked.append(command_json)
            await go_on.wait()
            return await answers(method, command_json)

        client.call_utility_async = stuck  # type: ignore[method-assign]
        engine = EngineStatus(client, {}, timeout_sec=0.02)
        for _ in range(3):
            with pytest.raises(EngineUnavailableError, match="did not answer within"):
                await engine.status()
        go_on.set()
        assert (await engine.status())["mode"] == "speculating"
        assert len(asked) == 1

    asyncio.run(run())


def test_viewers_share_an_answer_until_it_is_old():
    async def run() -> None:
        client = FakeEngineClient(make_status())
        now = [0.0]
        engine = EngineStatus(client, {}, clock=lambda: now[0])
        await asyncio.gather(*(engine.status(max_age_sec=0.5) for _ in range(5)))
        await engine.status(max_age_sec=0.5)
        assert len(client.commands) == 1
        now[0] = 0.6
        await engine.status(max_age_sec=0.5)
        assert len(client.commands) == 2

    asyncio.run(run())


def test_page_is_one_document_that_may_fetch_only_the_status():
    app, _ = make_app(FakeEngineClient(make_status()))
    response = ask(app, "GET", "/specdec/")
    page = response.text
    assert response.headers["content-type"].startswith("text/html") and page == live_page()
    assert "default-src 'none'" in page and "connect-src 'self'" in page
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page and "src=" not in page
    for name in ("style.css", "charts.js", "page.js"):
        assert f"/* {name} */" not in page and (endpoints.PAGE / name).read_text() in page


def test_folder_without_its_slash_leads_to_the_page():
    response = ask(make_app(FakeEngineClient(make_status()))[0], "GET", "/specdec")
    assert response.is_redirect and str(response.next_request.url) == "http://server/specdec/"


def test_read_policy_gives_what_parse_policy_takes():
    assert [read_policy(text) for text in (b"auto", b"fixed:0")] == ["auto", "fixed:0"]


def test_packaging_names_the_plugin_and_ships_its_files():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    entry = importlib.metadata.EntryPoint(
        "specdec", project["project"]["entry-points"]["vllm.endpoint_plugins"]["specdec"], "vllm.endpoint_plugins"
    )
    plugin = entry.load()()
    assert (plugin.name, plugin.required_tasks) == ("specdec", ("generate",))
    folder = endpoints.PAGE.parent
    shipped = {path for glob in project["tool"]["setuptools"]["package-data"]["serving"] for path in folder.glob(glob)}
    assert shipped == {*endpoints.PAGE.iterdir(), folder / "grafana.json"}
