"""``POST /specdec/head`` and ``specdec swap``: what is refused never reaches the engine."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.swap import request_swap
from tests.fake_engine import FakeEngineClient, make_app, make_status
from tests.head_files import K, write_head, write_target
from tests.unit.test_endpoints import ask, message


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, FakeEngineClient]:
    """A server that was started with the head in ``first``; ``second`` would fit."""
    target = write_target(tmp_path / "target")
    for name in ("first", "second"):
        write_head(tmp_path / name, target)
    facts = {"head": "eagle3", "head_dir": str(tmp_path / "first")}
    monkeypatch.setenv("SPECDEC_STATUS", json.dumps(facts))
    client = FakeEngineClient(make_status(head_dir=None, max_speculative_tokens=K))
    return make_app(client, model=str(tmp_path / "target"))[0], client


def post(app: Any, directory: Path, **options: Any) -> httpx.Response:
    return ask(app, "POST", "/specdec/head", json={"path": str(directory)}, **options)


def swaps(client: FakeEngineClient) -> list[dict[str, Any]]:
    return [command for command in client.commands if command["command"] == "swap"]


def test_a_head_that_fits_reaches_the_engine_with_all_that_it_must_know(running, tmp_path):
    app, client = running
    assert ask(app, "GET", "/specdec/status").json()["head_dir"] == str(tmp_path / "first")
    response = post(app, tmp_path / "second")
    assert (response.status_code, response.json()["head_dir"]) == (200, str(tmp_path / "second"))
    [order] = swaps(client)
    layout = order.pop("layout")
    assert layout["d2t"] == ["I64", [16]] and layout["fc.weight"] == ["F32", [8, 24]]
    assert order == {
        "command": "swap", "head": "eagle3", "head_dir": str(tmp_path / "second"), "method": "eagle3",
        "conditional_rates": [], "running": str(tmp_path / "first"),
    }  # fmt: skip


def test_a_running_head_whose_files_are_gone_is_still_known(running, tmp_path):
    """A new head is often trained into the old one's directory."""
    app, client = running
    for path in (tmp_path / "first").iterdir():
        path.unlink()
    assert post(app, tmp_path / "second").status_code == 200 and len(swaps(client)) == 1


def test_a_head_that_does_not_fit_is_refused_and_the_engine_never_hears_of_it(running, tmp_path):
    app, client = running
    weights = tmp_path / "second" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    response = post(app, tmp_path / "second")
    assert response.status_code == 409
    assert message(response).startswith("the head stays as it is: ") and "truncated" in message(response)
    assert "does not exist" in message(post(app, tmp_path / "third"))
    config = tmp_path / "second" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": 7}))
    weights.write_bytes(weights.read_bytes() + bytes(4))
    response = post(app, tmp_path / "second")
    assert response.status_code == 409 and "can't be judged" in message(response)
    assert swaps(client) == []


@pytest.mark.parametrize(
    "body", [b"", b"/heads/new", b"[]", b'{"path": 3}', b'{"path": "heads/new"}', b'{"path": "/a\\u0000b"}', b"[" * 900]
)
def test_a_body_without_a_path_is_a_bad_request(running, body):
    app, client = running
    response = ask(app, "POST", "/specdec/head", content=body)
    assert response.status_code == 400 and "absolute path" in message(response)
    assert response.json()["error"]["param"] == "path" and client.commands == []
    assert ask(app, "POST", "/specdec/head", content=b" " * 20_000).status_code == 400


def test_swapping_needs_vllms_api_key(tmp_path):
    client = FakeEngineClient(make_status())
    app, _ = make_app(client, api_key=["secret"])
    assert post(app, tmp_path).status_code == 401
    assert post(app, tmp_path, headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.commands == []
    assert post(app, tmp_path, headers={"Authorization": "Bearer secret"}).status_code == 409


def test_a_server_without_a_head_of_ours_says_so(tmp_path):
    response = post(make_app(FakeEngineClient(make_status()))[0], tmp_path)
    assert response.status_code == 409 and "--head" in message(response)


def test_what_the_engine_refuses_is_a_conflict_and_a_dead_engine_is_not(running, tmp_path):
    app, client = running
    answers = client.call_utility_async

    async def refusing(method: str, command_json: str) -> str:
        if json.loads(command_json)["command"] == "swap":
            return json.dumps({"error": "fc.weight holds numbers that are not finite"})
        return await answers(method, command_json)

    client.call_utility_async = refusing  # type: ignore[method-assign]
    response = post(app, tmp_path / "second")
    assert response.status_code == 409 and "not finite" in message(response)
    client.errored = True
    assert post(app, tmp_path / "second").status_code == 503


def test_swaps_come_one_after_another(running, tmp_path):
    app, client = running
    answers, open_swaps = client.call_utility_async, []

    async def slow(method: str, command_json: str) -> str:
        if json.loads(command_json)["command"] == "swap":
            open_swaps.append(1)
            assert len(open_swaps) == 1
            await asyncio.sleep(0.01)
            open_swaps.pop()
        return await answers(method, command_json)

    client.call_utility_async = slow  # type: ignore[method-assign]

    async def both() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            body = {"path": str(tmp_path / "second")}
            responses = await asyncio.gather(*(http.post("/specdec/head", json=body) for _ in range(2)))
            return [response.status_code for response in responses]

    assert asyncio.run(both()) == [200, 200] and len(swaps(client)) == 2


@pytest.fixture
def server():
    """Answers POST with what is put into ``answers``; ``asked`` holds what came."""
    answers: list[tuple[int, bytes]] = []
    asked: list[tuple[str, str | None, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, self.headers.get("authorization"), body))
            status, content = answers.pop()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}", answers, asked
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_client_sends_an_absolute_path_and_the_key(server, tmp_path, monkeypatch):
    url, answers, asked = server
    monkeypatch.chdir(tmp_path)
    answers.append((200, b'{"head": "eagle3"}'))
    assert request_swap(f"{url}/v1/", Path("new"), "secret") == {"head": "eagle3"}
    assert asked == [("/specdec/head", "Bearer secret", {"path": str(tmp_path / "new")})]


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (409, b'{"error": {"message": "it does not fit"}}', "^it does not fit$"),
        (404, b"", "can swap heads"),
        (502, b"<html>", "answered 502: <html>"),
        (500, b"[]", "answered 500"),
    ],
)
def test_the_client_says_what_the_server_says(server, tmp_path, status, content, says):
    url, answers, _ = server
    answers.append((status, content))
    with pytest.raises(ValueError, match=says):
        request_swap(url, tmp_path, None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url", "http://"])
def test_the_client_says_where_nobody_listens(url, tmp_path):
    with pytest.raises(ValueError, match="cannot reach"):
        request_swap(url, tmp_path, None)
