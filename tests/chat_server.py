"""An OpenAI server that says what a test scripts, chunk by chunk."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = "cut"  # in a script: the connection ends here
END = "end"  # in a script: the response ends here, and never said so


def said(content: str | None = None, finish: str | None = None, **delta: str) -> dict[str, Any]:
    """A chunk of text; ``reasoning=`` or ``reasoning_content=`` for text that the server calls thinking."""
    return {"choices": [{"delta": {"content": content, **delta}, "finish_reason": finish}]}


def usage(num_tokens: int, num_drafts: int = 0, num_accepted: int = 0) -> dict[str, Any]:
    """The last chunk; with drafts as vLLM's summary of the request's speculation."""
    steps = {"num_spec_steps": num_drafts, "num_accepted_draft_tokens": num_accepted}
    metrics = {"metrics": {"speculative_decoding": steps}} if num_drafts else {}
    return {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": num_tokens}, **metrics}


class ChatServer(ThreadingHTTPServer):
    """Answers the n-th chat request with ``scripts[n]``, the last one again and again. A script holds chunks, seconds
    to wait, ``CUT`` and ``END``."""

    daemon_threads = True

    def __init__(self, *scripts: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scripts = list(scripts)
        self.refusal: tuple[int, Any] | None = None  # status and body of every chat request
        self.status: dict[str, Any] | None = None  # at /specdec/status
        self.prompt_end: str | None = None  # what a rendered prompt ends with; None: it shows none
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.client_left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        pages = {"/v1/models": {"data": [{"id": "scripted"}, {"id": "other"}]}, "/specdec/status": self.server.status}
        page = pages.get(self.path)
        self._reply(200 if page else 404, page or {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt_end = self.server.prompt_end
        if self.path in ("/tokenize", "/detokenize"):
            answer = {"tokens": list(range(20))} if self.path == "/tokenize" else {"prompt": prompt_end}
            return self._reply(404 if prompt_end is None else 200, answer)
        self.server.keys.append(self.headers["Authorization"])
        if self.server.refusal:
            return self._reply(*self.server.refusal)
        self.server.bodies.append(body)
        try:
            self._stream(self.server.scripts[min(len(self.server.bodies), len(self.server.scripts)) - 1])
        except (BrokenPipeError, ConnectionResetError):
            self.server.client_left.set()

    def _stream(self, script: list[Any]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in script:
            if event == CUT:
                self.close_connection = True
                return
            if event == END:
                break
            if isinstance(event, float):
                time.sleep(event)
            else:
                self._send(event if isinstance(event, str) else json.dumps(event, ensure_ascii=False))
        else:
            self._send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _reply(self, status: int, answer: Any) -> None:
        data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(data)
