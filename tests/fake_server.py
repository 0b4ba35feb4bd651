"""A fake OpenAI server in vLLM's manner."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

K = 3


class FakeServer(ThreadingHTTPServer):
    """Streams ``tokens_per_step`` tokens every ``step_sec``; ``faults`` maps prompts to what goes wrong with them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, step_sec: float = 0.004, tokens_per_step: int = 1, num_tokens: int = 12, name: str = "fake"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.step_sec, self.tokens_per_step, self.num_tokens, self.name = step_sec, tokens_per_step, num_tokens, name
        self.faults: dict[str, str] = {}
        self.forks: dict[str, tuple[int, int]] = {}  # prompt -> (position, other token)
        self.texts: dict[str, str] = {}  # prompt -> text of its first token; the rest is "x\u2028y"
        self.logprobs: dict[int, float] = {}
        self.template_end = ""  # what the rendered prompt ends with
        self.speculative = tokens_per_step > 1
        self.counters = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "per_pos": [0] * K}
        self.num_steps = 0
        self.api_key: str | None = None  # wanted below /v1
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
        steps = f'vllm:iteration_tokens_total_count{{engine="0"}} {float(self.num_steps)}\n'
        if not self.speculative:
            return "# HELP nothing here\nvllm:num_requests_running 0\n" + steps
        base, labels = "vllm:spec_decode_num_", 'engine="0",model_name="fake"'
        lines = [f"{base}{key}_total{{{labels}}} {float(self.counters[key])}" for key in ("drafts", "draft_tokens")]
        lines.append(f"{base}accepted_tokens_total{{{labels}}} {float(self.counters['accepted_tokens'])}")
        for i, count in enumerate(self.counters["per_pos"]):
            lines.append(f'{base}accepted_tokens_per_pos_total{{{labels},position="{i}"}} {float(count)}')
            lines.append(f'{base}accepted_tokens_per_pos_created{{{labels},position="{i}"}} 1.7e9')
        return "\n".join(["# TYPE vllm:spec_decode_num_drafts counter", *lines, steps])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *args) -> None:
        pass

    def _is_refused(self) -> bool:
        key = self.server.api_key
        refused = key is not None and self.path.startswith("/v1/") and self.headers["Authorization"] != f"Bearer {key}"
        if refused:
            self._reply(401, "Unauthorized")
        return refused

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if self.path == "/metrics":
            self._reply(200, self.server.metrics())
        else:
            self._reply(200, json.dumps({"data": [{"id": "fake-model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_refused():
            return
        if self.path == "/detokenize":
            return self._reply(200, json.dumps({"prompt": f"<b>{body['tokens'][0]}</b>{self.server.template_end}"}))
        if self.path == "/tokenize":
            return self._reply(200, json.dumps({"tokens": [901, 902]}))
        if self.path == "/v1/completions" and not body.get("stream"):
            self.server.log.append(body)
            top = {f"token_id:{token}": logprob for token, logprob in self.server.logprobs.items()}
            return self._reply(200, json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]}))
        self.server.log.append(body)
        self.server.on_chat(len(self.server.log))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._chat(body)

    def _chat(self, body: dict) -> None:
        is_chat = "messages" in body
        prompt = body["messages"][0]["content"] if is_chat else "forced"
        fault = self.server.faults.get(prompt)
        if fault in ("429", "400", "503"):
            return self._reply(int(fault), "no")
        self.send_response(200)
        if fault == "bad encoding":
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = self.server.answer(prompt, body.get("temperature") == 0)[: body["max_tokens"]]
        if is_chat:
            role = {"delta": {"role": "assistant", "content": ""}}
            self._send({"choices": [role], "prompt_token_ids": [1, len(prompt)]})
        accepted: list[int] = []
        start, step, sent = time.perf_counter(), 0, 0
        while sent < len(tokens):
            step += 1
            time.sleep(max(0.0, start + step * self.server.step_sec - time.perf_counter()))
            width = 1 if step == 1 else self.server.tokens_per_step
            piece, sent = tokens[sent : sent + width], sent + width
            if self.server.speculative and step > 1:
                self.server.count_draft(width - 1)
                accepted.append(width - 1)
            self.server.num_steps += 1
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
            text = self.server.texts.get(prompt, "x\u2028y") if step == 1 else "x\u2028y"
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            self._send({"choices": [{**said, "token_ids": piece, "finish_reason": finish}]})
        if fault != "no usage":
            usage = {"prompt_tokens": 2, "completion_tokens": len(tokens)}
            steps = {"per_step_accepted": accepted, "per_step_drafted": [K] * len(accepted)}
            self._send({"choices": [], "usage": usage, "metrics": {"speculative_decoding": steps}})
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
