"""The client against a fake server: timing, tokens, thinking, kinds of error."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from fake_server import FakeServer, K, serving

from specdec.evaluation.arms import Arm
from specdec.evaluation.client import ArmClient
from specdec.evaluation.records import ERROR_KINDS, RequestResult
from specdec.evaluation.stream import StreamReader


def ask(server: FakeServer, prompt: str = "hello", timeout_sec: float = 20, **kwargs) -> RequestResult:
    async def once() -> RequestResult:
        arm = Arm(name="plain", url=server.url, model="fake-model", xargs=kwargs.get("xargs", {}))
        async with ArmClient(arm, timeout_sec) as client:
            return await client.chat(
                [{"role": "user", "content": prompt}],
                kwargs.get("max_tokens", 100),
                kwargs.get("temperature", 0.0),
                kwargs.get("thinking_budget"),
                kwargs.get("seed"),
            )

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


def test_request_body_says_what_it_must_and_no_seed_unless_asked():
    server = FakeServer()
    ask(server, temperature=None, xargs={"specdec": "2"})
    (body,) = server.log
    assert body["vllm_xargs"] == {"specdec": "2"}
    assert "temperature" not in body and "seed" not in body
    assert body["stream_options"] == {"include_usage": True} and body["return_token_ids"] is True
    ask(seeded := FakeServer(), seed=0)
    assert seeded.log[0]["seed"] == 0


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
        ("bad encoding", "malformed"),
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
            return await client.chat([{"role": "user", "content": "hello"}], 4, 0.0)

    assert asyncio.run(once()).error == "disconnected"


def read(chunks: list[tuple[float, dict]], opens_think: bool = False) -> RequestResult:
    reader = StreamReader(opens_think)
    for now, choice in chunks:
        reader.take({"choices": [choice]}, now)
    reader.take({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": len(chunks)}}, 9.0)
    reader.end(complete=True)
    return reader.result


def said(text: str, finish: str | None = None, **delta) -> dict:
    return {"delta": {"content": text, **delta}, "token_ids": [7], "finish_reason": finish}


def test_first_visible_token_comes_after_the_thinking():
    thinking = [
        (1.0, said("<th")),
        (2.0, said("ink>hm")),
        (3.0, said("</think>")),
        (4.0, said("\n")),
        (5.0, said("4", "stop")),
    ]
    result = read(thinking)
    assert (result.ttft_sec, result.ttfvt_sec, result.num_think_tokens) == (1.0, 5.0, 2)
    assert read([(1.0, said("4", "stop"))]).ttfvt_sec == 1.0
    unclosed = read([(1.0, said("<think>hm")), (2.0, said("hm", "length"))])
    assert unclosed.ttfvt_sec is None and unclosed.num_think_tokens == 2


def test_thinking_that_the_template_opened_or_the_server_parsed():
    opened = read([(1.0, said("hm")), (2.0, said("</think>\n4", "stop"))], opens_think=True)
    assert (opened.ttfvt_sec, opened.num_think_tokens) == (2.0, 1)
    assert opened.text == "<think>hm</think>\n4"
    parsed = read([(1.0, said("", reasoning="hm")), (2.0, said("4", "stop"))])
    assert (parsed.ttfvt_sec, parsed.num_think_tokens, parsed.text) == (2.0, 1, "<think>hm</think>4")
    cut = read([(1.0, said("", reasoning="hm")), (2.0, said("", "length", reasoning="hm"))])
    assert cut.text == "<think>hmhm" and cut.ttfvt_sec is None  # no answer, and none must be found in it


def test_a_thinking_budget_closes_the_thinking_and_asks_for_the_answer():
    server = FakeServer(num_tokens=12)
    server.texts["hello"] = "<think>"
    result = ask(server, thinking_budget=5, max_tokens=4)
    first, second = server.log
    assert first["max_tokens"] == 5 and second["max_tokens"] == 4
    assert second["prompt"] == [1, 5, *server.answer("hello", True)[:5], 901, 902]
    assert result.error is None and result.num_output_tokens == 9 and result.num_think_tokens == 5
    assert result.text.count("</think>") == 1 and result.ttft_sec < result.ttfvt_sec <= result.e2e_sec


@pytest.mark.parametrize(("text", "asked"), [("<think>hm</think>4", 3), ("plain text", 3)])
def test_an_answer_that_began_within_the_thinking_budget_gets_all_of_its_tokens(text, asked):
    server = FakeServer(num_tokens=12)
    server.texts["hello"] = text
    result = ask(server, thinking_budget=5, max_tokens=8)
    assert server.log[1]["max_tokens"] == asked
    assert server.log[1]["prompt"] == [1, 5, *server.answer("hello", True)[:5]]  # nothing is closed once more
    assert result.num_output_tokens == 8 and result.text.count("</think>") == text.count("</think>")
    short = FakeServer(num_tokens=12)
    short.texts["hello"] = text
    assert ask(short, thinking_budget=5, max_tokens=5).num_output_tokens == 5 and len(short.log) == 1


def test_the_context_of_a_token_holds_what_the_client_put_in_between():
    result = RequestResult(prompt_token_ids=[1, 2], token_ids=[3, 4, 5, 6], forced_from=[1, 2], closing_token_ids=[9])
    contexts = [result.context_ids(position) for position in range(5)]
    assert contexts == [[1, 2], [1, 2, 3], [1, 2, 3, 4, 9], [1, 2, 3, 4, 9, 5], [1, 2, 3, 4, 9, 5, 6]]
    plain = RequestResult(prompt_token_ids=[1], token_ids=[3, 4])
    assert plain.context_ids(1) == [1, 3]


@pytest.mark.parametrize("steps", [([3, 3], [1]), ([3], [4]), ([3], [-1])])
def test_step_lists_that_cannot_be_are_an_error_and_no_crash(steps):
    reader = StreamReader()
    metrics = {"speculative_decoding": {"per_step_drafted": steps[0], "per_step_accepted": steps[1]}}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    reader.take({"choices": [said("4", "stop")], "usage": usage, "metrics": metrics}, 1.0)
    reader.end(complete=True)
    assert reader.result.error == "malformed" and reader.result.acceptance.num_drafts == 0


def test_a_forced_answer_says_where_it_begins():
    server = FakeServer(num_tokens=12, tokens_per_step=2)
    server.texts["hello"] = "<think>"
    result = ask(server, thinking_budget=5, max_tokens=3)
    assert result.accepted_per_step == [1, 1, 1] and result.forced_from == [2, 5]
    assert ask(FakeServer(num_tokens=5)).forced_from == []


def test_the_steps_of_a_speculative_request_are_its_own():
    result = ask(FakeServer(tokens_per_step=3, num_tokens=7))
    assert result.accepted_per_step == [2, 2] and result.drafted_per_step == [K, K]
    assert result.acceptance.acceptance_length == pytest.approx(3.0)


def test_a_wall_clock_that_jumps_is_reported_and_spoils_no_timing(monkeypatch):
    jumped = iter([1000.0, 5000.0])
    clocks = SimpleNamespace(time=lambda: next(jumped), perf_counter=time.perf_counter)
    monkeypatch.setattr("specdec.evaluation.client.time", clocks)
    result = ask(FakeServer(num_tokens=3))
    assert result.clock_jump_sec == pytest.approx(4000, abs=60) and 0 < result.e2e_sec < 20 and not result.error
