"""Prompts shared over servers: every prompt is answered once, whichever server dies, and ids stay ids."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from draft_training import endpoints
from draft_training.completions import CompletionLog
from draft_training.endpoints import generate_over_http
from specdec.config import TracesConfig
from specdec.record import text_sha256
from specdec.targets import Target

REQUESTS = {f"prompt {i}": [1, 2, i] for i in range(40)}
TARGET = Target(
    name="t", path=Path(), config={"max_position_embeddings": 64}, sampling={"temperature": 0.6, "top_p": 0.95}
)


class Server(ThreadingHTTPServer):
    """Answers prompt ids with ids made of them; closes its doors after ``dies_after`` answers."""

    daemon_threads = True

    def __init__(self, *, dies_after: int | None = None, status: int = 200, token_ids: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dies_after, self.status, self.token_ids = dies_after, status, token_ids
        self.lock = threading.Lock()
        self.answered: list[list[int]] = []
        self.bodies: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.reply(404, {})
        with self.server.lock:
            self.server.bodies.append(body)
            if self.server.dies_after is not None and len(self.server.answered) >= self.server.dies_after:
                return self.connection.close()  # mid-request, as a killed process does
            self.server.answered.append(body["prompt"])
        choice = {"text": "", "finish_reason": "stop"}
        if self.server.token_ids:
            choice["token_ids"] = [100 + body["prompt"][-1], 7]
        self.reply(self.server.status, {"choices": [choice]})

    def reply(self, status: int, tree: dict) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(*servers: Server) -> Iterator[TracesConfig]:
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield TracesConfig(endpoints=[server.url for server in servers], max_num_seqs=4, max_new_tokens=16)
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "PAUSE_SEC", 0.01)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_each_once(path: Path) -> None:
    written = lines(path)
    assert sorted(item["prompt"] for item in written) == sorted(REQUESTS)
    for item in written:
        ids = REQUESTS[item["prompt"]]
        assert (item["prompt_ids"], item["completion_ids"]) == (ids, [100 + ids[-1], 7])
        assert (item["conversation_id"], item["finish_reason"]) == (text_sha256(item["prompt"]), "stop")


def test_two_servers_share_the_prompts(tmp_path: Path):
    first, second = Server(), Server()
    with serving(first, second) as traces:
        generate_over_http(TARGET, traces, REQUESTS, CompletionLog(tmp_path / "log.jsonl"))
    assert_each_once(tmp_path / "log.jsonl")
    assert first.answered and second.answered
    assert len(first.answered) + len(second.answered) == len(REQUESTS)
    sent = first.bodies[0]
    assert (sent["model"], sent["temperature"], sent["top_p"], sent["max_tokens"]) == ("served", 0.6, 0.95, 16)
    assert sent["return_token_ids"] is True


def test_a_server_that_dies_in_the_middle_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dying, other = Server(dies_after=5), Server()
    with serving(dying, other) as traces:
        generate_over_http(TARGET, traces, REQUESTS, CompletionLog(tmp_path / "log.jsonl"))
    assert_each_once(tmp_path / "log.jsonl")
    assert len(dying.answered) == 5 and len(other.answered) == len(REQUESTS) - 5
    assert f"{dying.url} is given up" in caplog.text


def test_when_all_are_gone_the_rest_is_answered_by_a_later_run_exactly_once(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with (
        serving(Server(dies_after=6), Server(dies_after=4)) as traces,
        pytest.raises(ValueError, match=r"every endpoint is gone with 30 prompts left; .* run the same command again"),
    ):
        generate_over_http(TARGET, traces, REQUESTS, CompletionLog(path))
    log = CompletionLog(path)
    missing = log.missing(REQUESTS)
    assert len(missing) == 30
    last = Server()
    with serving(last) as traces:
        generate_over_http(TARGET, traces, missing, log)
    assert len(last.answered) == 30
    assert_each_once(path)
    assert log.missing(REQUESTS) == {}


def test_a_server_that_never_was_is_left_out_and_none_at_all_is_an_error(tmp_path: Path):
    with serving(Server()) as traces:
        traces.endpoints.insert(0, "http://127.0.0.1:9")
        generate_over_http(TARGET, traces, REQUESTS, CompletionLog(tmp_path / "log.jsonl"))
    assert_each_once(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"no endpoint answers: http://127\.0\.0\.1:9"):
        generate_over_http(TARGET, TracesConfig(endpoints=["http://127.0.0.1:9"]), REQUESTS, CompletionLog(tmp_path))


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (lambda: Server(status=400), r"refuses a prompt \(400\)"),
        (lambda: Server(token_ids=False), "returns no token ids"),
    ],
)
def test_what_another_try_would_not_change_ends_the_run(tmp_path: Path, server, complaint: str):
    with serving(server()) as traces, pytest.raises(ValueError, match=complaint):
        generate_over_http(TARGET, traces, REQUESTS, CompletionLog(tmp_path / "log.jsonl"))
