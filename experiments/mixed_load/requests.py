"""Every kind of request that a server meets, with the status that it must answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from specdec.evaluation.suites import load_suite

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request. ``abort_after``: chunks."""

    kind: str
    path: str = CHAT
    body: dict[str, Any] | bytes = field(default_factory=dict)
    status: int = 200
    abort_after: int | None = None

    @property
    def reference(self) -> Request | None:
        """What a plain server is asked for the text that this must give, or begin; None where no text must be given."""
        if self.status != 200 or not isinstance(self.body, dict):
            return None
        if self.body.get("temperature") != 0 and "seed" not in self.body:
            return None
        body = {key: value for key, value in self.body.items() if key not in ("stream", "vllm_xargs")}
        return Request(kind="reference", path=self.path, body=body)


def prompts(count: int) -> list[str]:
    """Short tasks."""
    return [item.turns[0] for item in load_suite("reasoning-gym", count, seed=5).items]


def make_requests(count: int, model: str, max_model_len: int, seed: int = 0) -> list[Request]:
    """``count`` requests in random order, every kind about equally often."""
    rng = random.Random(seed)
    texts = prompts(40)
    makers = [
        _greedy, _greedy_stream, _greedy_off, _sampled, _seeded, _several, _stop, _logprobs, _schema, _choice,
        _seeded_long, _aborted, _bad_json, _no_messages, _huge, _too_long, _other_model, _bad_xargs, _completion,
    ]  # fmt: skip
    made = [makers[i % len(makers)](rng, rng.choice(texts), model, max_model_len) for i in range(count)]
    rng.shuffle(made)
    return made


def _body(text: str, model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 32, **more}


def _greedy(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="greedy", body=_body(text, model, temperature=0))


def _greedy_stream(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="greedy, streamed", body=_body(text, model, temperature=0, stream=True))


def _greedy_off(rng: random.Random, text: str, model: str, length: int) -> Request:
    wish = rng.choice(["off", "auto", 1, "2", 3])
    body = _body(text, model, temperature=0, vllm_xargs={"specdec": wish})
    return Request(kind="greedy, own width", body=body)


def _sampled(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="sampled", body=_body(text, model, temperature=0.8, top_p=0.9))


def _seeded(rng: random.Random, text: str, model: str, length: int) -> Request:
    wish = rng.choice(["off", "auto", 1, 3])
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(10**6)}
    return Request(kind="seed", body=_body(text, model, **sampling, vllm_xargs={"specdec": wish}))


def _several(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="n > 1", body=_body(text, model, temperature=0.8, n=rng.choice([2, 3])))


def _stop(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="stop strings", body=_body(text, model, temperature=0, stop=["\n", ". "]))


def _logprobs(rng: random.Random, text: str, model: str, length: int) -> Request:
    sampling = {"temperature": 0.5, "seed": rng.randrange(10**6)}
    return Request(kind="logprobs", body=_body(text, model, **sampling, logprobs=True, top_logprobs=3))


def _schema(rng: random.Random, text: str, model: str, length: int) -> Request:
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    return Request(kind="JSON schema", body=_body(text, model, temperature=0, response_format=asked))


def _choice(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="choice", body=_body(text, model, structured_outputs={"choice": ["yes", "no", "perhaps"]}))


def _seeded_long(rng: random.Random, text: str, model: str, length: int) -> Request:
    long = "Consider this. " * (length // 6) + text
    return Request(kind="seed, long prompt", body=_body(long, model, temperature=0.7, seed=rng.randrange(10**6)))


def _aborted(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="aborted", body=_body(text, model, temperature=0, stream=True), abort_after=rng.randrange(1, 6))


def _bad_json(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="bad JSON", body=b'{"model": "x", "messages": [', status=400)


def _no_messages(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="no messages", body={"model": model, "max_tokens": 4}, status=400)


def _huge(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="huge max_tokens", body=_body(text, model) | {"max_tokens": 10**9}, status=400)


def _too_long(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="prompt too long", body=_body("word " * (2 * length), model), status=400)


def _other_model(rng: random.Random, text: str, model: str, length: int) -> Request:
    return Request(kind="unknown model", body=_body(text, "no-such-model"), status=404)


def _bad_xargs(rng: random.Random, text: str, model: str, length: int) -> Request:
    wish = rng.choice(["on", -1, 99, 1.5, True, [1]])
    return Request(kind="bad vllm_xargs", body=_body(text, model, vllm_xargs={"specdec": wish}), status=400)


def _completion(rng: random.Random, text: str, model: str, length: int) -> Request:
    body = {"model": model, "prompt": text, "max_tokens": 16, "temperature": 0}
    return Request(kind="completion", path=COMPLETIONS, body=body)
