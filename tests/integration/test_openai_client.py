"""The ``openai`` package and ``specdec chat`` against a real server of a tiny R1-Distill target, asked for a key."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve import MAX_MODEL_LEN, served

from specdec.traces import prompt_ids
from tests.tiny import R1_LATE_TEMPLATE, R1_SPECIAL, save_tiny_target, tiny_tokenizer

pytestmark = pytest.mark.vllm

KEY = "a-key-for-tests"
QUESTION: list[Any] = [{"role": "user", "content": "Count from 1 to 9."}]
TOKENIZER = tiny_tokenizer(R1_SPECIAL, R1_LATE_TEMPLATE)
# Random weights would write anything: two letters to choose from, and no early end, make a reply of 8 characters.
LETTERS = {"allowed_token_ids": TOKENIZER("hm")["input_ids"], "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "extra_body": LETTERS}


@pytest.fixture(scope="module")
def openai() -> Any:
    pytest.importorskip("vllm", reason="needs vLLM")
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def facts(openai: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The server's ready line."""
    directory = tmp_path_factory.mktemp("r1")
    save_tiny_target(directory, tokenizer=TOKENIZER, max_position_embeddings=MAX_MODEL_LEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        with served(tmp_path_factory.mktemp("log"), "--target", str(directory), "--no-speculation") as line:
            yield line


@pytest.fixture
def client(openai: Any, facts: dict[str, Any]) -> Any:
    http = httpx.Client(trust_env=False)
    return openai.OpenAI(base_url=f"{facts['url']}/v1", api_key=KEY, max_retries=0, timeout=120, http_client=http)


def test_sync_requests(client, facts):
    assert [model.id for model in client.models.list()] == [facts["model"]]
    chat = client.chat.completions.create(model=facts["model"], messages=QUESTION, **SHORT)
    (choice,) = chat.choices
    assert choice.finish_reason == "length" and chat.usage.completion_tokens == 8
    assert choice.message.content is None, "the reply starts inside its thinking, and the parser says so"
    assert set(choice.message.model_extra["reasoning"]) <= set("hm")
    text = client.completions.create(model=facts["model"], prompt="One, two,", **SHORT)
    assert len(text.choices[0].text) == 8 and text.usage.completion_tokens == 8


def test_a_stream_adds_up_to_the_whole_reply(client, facts):
    whole = client.chat.completions.create(model=facts["model"], messages=QUESTION, **SHORT)
    chunks = list(
        client.chat.completions.create(
            model=facts["model"], messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SHORT
        )
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    reasoning = "".join((delta.model_extra or {}).get("reasoning") or "" for delta in deltas)
    assert reasoning == whole.choices[0].message.model_extra["reasoning"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


def test_async_requests_and_streams(openai, facts):
    async def ask() -> tuple[list[Any], int]:
        async with openai.AsyncOpenAI(
            base_url=f"{facts['url']}/v1", api_key=KEY, max_retries=0, timeout=120,
            http_client=httpx.AsyncClient(trust_env=False),
        ) as client:  # fmt: skip
            create = client.chat.completions.create
            replies = [create(model=facts["model"], messages=QUESTION, **SHORT) for _ in range(3)]
            stream = await create(model=facts["model"], messages=QUESTION, stream=True, **SHORT)
            num_chunks = len([chunk async for chunk in stream])
            return await asyncio.gather(*replies), num_chunks

    replies, num_chunks = asyncio.run(ask())
    assert len({reply.choices[0].message.model_extra["reasoning"] for reply in replies}) == 1, "greedy"
    assert num_chunks > 1


def test_errors_have_the_classes_that_clients_expect(openai, client, facts):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=facts["model"], prompt=[7] * (MAX_MODEL_LEN + 1))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()


def test_the_served_prompt_is_the_one_that_training_sees(facts):
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    body = {"model": facts["model"], "messages": messages}
    answer = httpx.post(f"{facts['url']}/tokenize", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json()["tokens"] == prompt_ids(TOKENIZER, f"Be brief.\n\n{QUESTION[0]['content']}")


def test_specdec_chat_talks_to_it(facts, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "specdec", "chat", "--url", facts["url"], "--max-tokens", "8"], input="Hi\n/quit\n",
        capture_output=True, text=True, timeout=120, env={**os.environ, "OPENAI_API_KEY": KEY},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and KEY not in done.stderr
