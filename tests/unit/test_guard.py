"""The guard in front of vLLM: which requests it refuses, and that it is invisible to all others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.guard import DEFAULT_MAX_BYTES, RequestGuard, allowed, bad_xarg, max_request_bytes


class Recorder:
    """An application that reads its request to the end and answers in pieces, noting all that it is told."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.called = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.called = True
        while not self.received or self.received[-1].get("more_body"):
            self.received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        self.received.append(await receive())  # a streaming answer watches for the client's leaving
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.received)


def drive(
    chunks: list[bytes],
    path: str = "/v1/completions",
    method: str = "POST",
    declared: bytes | None = None,
    root_path: str = "",
    **limits: Any,
) -> tuple[Recorder, int, Any, list[str]]:
    """Send a request through the guard; gives the app, the status, the error if any, and the order of events."""
    app = Recorder()
    guard = RequestGuard(app, **{"max_body_bytes": 100, "max_draft_tokens": 3} | limits)
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1} for i, chunk in enumerate(chunks)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[dict[str, Any]] = []
    order: list[str] = []

    async def receive() -> dict[str, Any]:
        order.append("receive")
        return messages.pop(0)

    async def send(message: Any) -> None:
        order.append("send")
        sent.append(message)

    headers = [] if declared is None else [(b"content-length", declared)]
    scope = {
        "type": "http",
        "method": method,
        "path": root_path + path,
        "root_path": root_path,
        "headers": headers,
    }
    asyncio.run(guard(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return app, sent[0]["status"], json.loads(body) if sent[0]["status"] != 200 else body, order


def test_request_and_answer_pass_unchanged_and_in_pieces():
    app, status, body, order = drive([b"one ", b"", b"two"])
    assert (status, body, app.body) == (200, b"ab", b"one two")
    assert app.received[-1] == {"type": "http.disconnect"}
    assert order == ["receive"] * 3 + ["send"] * 3 + ["receive", "send"]  # the answer's pieces go out as they come


def test_client_that_leaves_in_the_middle_is_seen_by_the_app():
    app = Recorder()
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
    messages.append({"type": "http.disconnect"})

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(RequestGuard(app, max_body_bytes=100)(scope, receive, send))
    assert [message["type"] for message in app.received[:2]] == ["http.request", "http.disconnect"]


def error_of(tree: Any, code: int) -> str:
    assert set(tree) == {"error"} and set(tree["error"]) == {"message", "type", "param", "code"}
    assert tree["error"]["code"] == code
    return tree["error"]["message"]


def test_declared_size_is_refused_without_reading():
    app, status, tree, order = drive([b"x"], declared=b"101")
    assert status == 413 and not app.called and "receive" not in order
    assert "100 bytes" in error_of(tree, 413) and "SPECDEC_MAX_REQUEST_BYTES" in error_of(tree, 413)
    assert drive([b"x"], declared=b"9" * 5000)[1] == 413
    assert drive([b"x" * 100], declared=b"100")[1] == 200


def test_size_that_was_not_declared_is_refused_while_reading():
    app, status, _, order = drive([b"x" * 60, b"x" * 60, b"x" * 60])
    assert status == 413 and not app.called and order.count("receive") == 2


@pytest.mark.parametrize(("path", "method"), [("/specdec/policy", "PUT"), ("/v1/models", "GET"), ("/metrics", "GET")])
def test_other_requests_are_not_looked_at(path, method):
    bad = json.dumps({"vllm_xargs": {"specdec": "fast"}, "pad": "x" * 200}).encode()
    app, status, _, order = drive([bad], path=path, method=method, declared=b"5000")
    assert status == 200 and app.body == bad and order[0] == "receive"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/invocations", "/inference/v1/generate"])
def test_no_path_that_takes_prompts_takes_more(path):
    assert drive([b"x" * 101], path=path)[1] == drive([b"x" * 101], path=path, root_path="/llm")[1] == 413
    assert drive([json.dumps({"vllm_xargs": {"specdec": "fast"}}).encode()], path=path)[1] == 400


def test_other_scopes_pass():
    async def run() -> list[str]:
        seen = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["type"])

        for kind in ("lifespan", "websocket"):
            await RequestGuard(app, max_body_bytes=1)({"type": kind}, None, None)  # type: ignore[arg-type]
        return seen

    assert asyncio.run(run()) == ["lifespan", "websocket"]


@pytest.mark.parametrize("value", ["off", "auto", 0, 3, "0", "3", "03"])
def test_good_values_pass(value):
    assert drive([json.dumps({"vllm_xargs": {"specdec": value}}).encode()])[1] == 200


@pytest.mark.parametrize(
    "value", ["fast", "", 4, -1, "4", "-1", True, False, 2.0, "2.0", None, [1], {}, "²", "9" * 9999]
)
def test_bad_values_are_refused_with_what_is_allowed(value):
    body = json.dumps({"vllm_xargs": {"specdec": value}}).encode()
    app, status, tree, _ = drive([body[:20], body[20:]], max_body_bytes=20_000)
    text = error_of(tree, 400)
    assert status == 400 and not app.called and tree["error"]["param"] == "vllm_xargs"
    assert '"auto", "off" or a number of draft tokens from 0 to 3' in text and len(text) < 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"vllm_xargs": {"specdec": "fast"}',  # vLLM says what is wrong with it
        b'["specdec"]',
        b'{"prompt": "specdec"}',
        b'{"vllm_xargs": "specdec"}',
        b'{"vllm_xargs": null, "prompt": "specdec"}',
        b'{"vllm_xargs": {"other": "specdec"}}',
        b'{"specdec":' + b"[" * 100_000,
        b'{"specdec":' + b"9" * 10_000 + b"}",
        b"\xff specdec",
    ],
)
def test_what_the_guard_cannot_judge_is_left_to_vllm(body):
    assert bad_xarg(body, 3) is None


def test_widest_draft_is_64_where_the_servers_is_unknown():
    assert drive([b'{"vllm_xargs": {"specdec": 64}}'], max_draft_tokens=None)[1] == 200
    assert drive([b'{"vllm_xargs": {"specdec": 65}}'], max_draft_tokens=None)[1] == 400


@given(st.binary(max_size=80).map(lambda tail: b'{"vllm_xargs": {"specdec": ' + tail))
def test_no_body_makes_the_guard_raise(body):
    bad_xarg(body, 3)


@given(st.one_of(st.integers(), st.text(max_size=5), st.floats(), st.none(), st.booleans()))
def test_only_what_is_documented_is_allowed(value):
    if allowed(value, 3):
        assert value in ("auto", "off") or int(value) in range(4)


@pytest.mark.parametrize(
    ("text", "limit"),
    [(None, DEFAULT_MAX_BYTES), ("", DEFAULT_MAX_BYTES), ("1000", 1000), ("0", 8 * 2**20), ("8 MiB", 8 * 2**20)],
)
def test_limit_comes_from_the_environment(text, limit):
    assert max_request_bytes(text) == limit
