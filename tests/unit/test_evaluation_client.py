"""A fake OpenAI server in vLLM's manner, and the client against it: timing, tokens, kinds of error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from specdec.evaluation.arms import Arm, given_arms
from specdec.evaluation.client import ERROR_KINDS, ArmClient, RequestResult

K = 3


class FakeServer(ThreadingHTTPServer):
    """Streams ``tokens_per_step`` tokens every ``step_sec``; ``faults`` maps prompts to what goes wrong with them."""

    daemon_threads = True

    def __init__(self, *, step_sec: float = 0.004, tokens_per_step: int = 1, num_tokens: int = 12, name: str = "fake"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.step_sec, self.tokens_per_step, self.num_tokens, self.name = step_sec, tokens_per_step, num_tokens, name
        self.faults: dict[str, str] = {}
        self.forks: dict[str, tuple[int, int]] = {}  # prompt -> (position, other token)
        self.logprobs: dict[int, float] = {}
        self.speculative = tokens_per_step > 1
        self.counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "per_pos": [0] * K}
        self.log: list[dict] = []  # request bodies, in the order of arrival
        self.on_chat = lambda number: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, prompt: str, greedy: bool) -> list[int]:
        tokens = [(sum(prompt.encode()) + 7 * i + (not greedy)) % 500 for i in range(self.num_tokens)]
        if prompt in self.forks:
            position, token = self.forks[prompt]
            tokens[position:] = [token + i for i in range(len(tokens) - position)]
        return tokens

    def count_draft(self, accepted: int) -> None:
        self.counters["drafts"] += 1
        self.counters["draft_tokens"] += K
        self.counters["accepted_tokens"] += accepted
        for i in range(accepted):
            self.counters["per_pos"][i] += 1

    def metrics(self) -> str:
        if not self.speculative:
            return "# HELP nothing here\nvllm:num_requests_running 0\n"
        base, labels = "vllm:spec_decode_num_", 'engine="0",model_name="fake"'
        lines = [f"{base}{key}_total{{{labels}}} {float(self.counters[key])}" for key in ("drafts", "draft_tokens")]
        lines.append(f"{base}accepted_tokens_total{{{labels}}} {float(self.counters['accepted_tokens'])}")
        for i, count in enumerate(self.counters["per_pos"]):
            lines.append(f'{base}accepted_tokens_per_pos_total{{{labels},position="{i}"}} {float(count)}')
            lines.append(f'{base}accepted_tokens_per_pos_created{{{labels},position="{i}"}} 1.7e9')
        return "\n".join(["# TYPE vllm:spec_decode_num_drafts counter", *lines, ""])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._reply(200, self.server.metrics())
        else:
            self._reply(200, json.dumps({"data": [{"id": "fake-model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/detokenize":
            return self._reply(200, json.dumps({"prompt": f"<b>{body['tokens'][0]}</b>"}))
        if self.path == "/v1/completions":
            self.server.log.append(body)
            top = {f"token_id:{token}": logprob for token, logprob in self.server.logprobs.items()}
            return self._reply(200, json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}))
        self.server.log.append(body)
        self.server.on_chat(len(self.server.log))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._chat(body)

    def _chat(self, body: dict) -> None:
        prompt = body["messages"][0]["content"]
        fault = self.server.faults.get(prompt)
        if fault in ("429", "400", "503"):
            return self._reply(int(fault), "no")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = self.server.answer(prompt, body.get("temperature") == 0)[: body["max_tokens"]]
        self._send({"choices": [{"delta": {"role": "assistant", "content": ""}}], "prompt_token_ids": [1, len(prompt)]})
        start, step, sent = time.perf_counter(), 0, 0
        while sent < len(tokens):
            step += 1
            time.sleep(max(0.0, start + step * self.server.step_sec - time.perf_counter()))
            width = 1 if step == 1 else self.server.tokens_per_step
            piece, sent = tokens[sent : sent + width], sent + width
            if self.server.speculative and step > 1:
                self.server.count_draft(width - 1)
            if fault == "stall":
                time.sleep(1.0)
            if fault == "disconnect" and step == 2:
                self.close_connection = True
                return
            if fault == "error" and step == 2:
                return self._end({"error": {"message": "engine died", "code": 500}})
            if fault == "truncate" and step == 2:
                return self._end()
            finish = "length" if sent >= len(tokens) else None
            # U+2028 inside the text is no end of a line of the event stream.
            self._send({"choices": [{"delta": {"content": "x\u2028y"}, "token_ids": piece, "finish_reason": finish}]})
        if fault != "no usage":
            self._send({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": len(tokens)}})
        self._end("[DONE]")

    def _send(self, event: object) -> None:
        text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _end(self, event: object | None = None) -> None:
        if event is not None:
            self._send(event)
        self.wfile.write(b"0\r\n\r\n")

    def _reply(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(*servers: FakeServer) -> Iterator[None]:
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def ask(server: FakeServer, prompt: str = "hello", timeout_sec: float = 20, **kwargs) -> RequestResult:
    async def once() -> RequestResult:
        async with ArmClient(Arm(name="plain", url=server.url, model="fake-model"), timeout_sec) as client:
            return await client.chat(prompt, kwargs.get("max_tokens", 100), kwargs.get("temperature", 0.0))

    with serving(server):
        return asyncio.run(once())


def test_tpot_counts_tokens_from_usage_not_chunks():
    result = ask(FakeServer(step_sec=0.02, tokens_per_step=4, num_tokens=13))
    assert result.error is None
    assert result.num_output_tokens == 13 and len(result.token_ids) == 13
    assert len(result.chunk_gaps_sec) == 3  # 1 + 4 + 4 + 4 tokens
    assert result.tpot_sec == pytest.approx((result.e2e_sec - result.ttft_sec) / 12)
    assert result.prompt_token_ids == [1, len("hello")]


def test_ttft_waits_for_a_token_not_for_the_role_chunk():
    result = ask(FakeServer(step_sec=0.05, num_tokens=2))
    assert result.ttft_sec >= 0.05 and 0.1 <= result.e2e_sec < 2  # the role chunk came at once


def test_request_body_says_what_it_must_and_no_seed():
    server = FakeServer()
    ask(server, temperature=None)
    (body,) = server.log
    assert "temperature" not in body and "seed" not in body
    assert body["stream_options"] == {"include_usage": True} and body["return_token_ids"] is True


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", "http_429"),
        ("400", "http_4xx"),
        ("503", "http_5xx"),
        ("disconnect", "disconnected"),
        ("truncate", "truncated"),
        ("error", "stream_error"),
        ("no usage", "missing_usage"),
        ("stall", "timeout"),
    ],
)
def test_each_failure_has_its_kind(fault, kind):
    server = FakeServer(num_tokens=4)
    server.faults["hello"] = fault
    result = ask(server, timeout_sec=0.3)
    assert result.error == kind and kind in ERROR_KINDS
    assert result.tpot_sec is None and result.error_detail


def test_unreachable_server_is_disconnected_and_named_when_given():
    server = FakeServer()
    server.server_close()

    async def once() -> RequestResult:
        async with ArmClient(Arm(name="plain", url=server.url, model="m")) as client:
            return await client.chat("hello", 4, 0.0)

    assert asyncio.run(once()).error == "disconnected"
    with pytest.raises(ValueError, match=r"the plain server .* does not answer"):
        given_arms(server.url, server.url)
