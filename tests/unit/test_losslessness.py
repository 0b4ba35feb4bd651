"""Greedy identity of several arms, and the verdict on each fork, against a client that answers from a table."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from specdec.evaluation.losslessness import BUG, TIE, UNKNOWN, check_greedy, judge_margin
from specdec.evaluation.records import BlockRun, Cell, Measurement, Record, RequestResult

PROMPT = (1, 2)
TEXT = "what is two and two?"


class Client:
    """The baseline server; ``logprobs`` may be an error to raise."""

    def __init__(self, logprobs=None):
        self.logprobs = {4: -0.7, 9: -0.71, 5: -6.0} if logprobs is None else logprobs
        self.asked = []

    async def next_token_logprobs(self, token_ids):
        self.asked.append(token_ids)
        if isinstance(self.logprobs, Exception):
            raise self.logprobs
        return self.logprobs

    async def detokenize(self, token_id):
        return f"<{token_id}>"


def output(arm, token_ids, item="a", prompt=PROMPT, error=None, cell="greedy", **changes):
    result = RequestResult(error=error, prompt_token_ids=list(prompt), token_ids=list(token_ids))
    return Record(arm=arm, cell=cell, suite="maths", item_id=item, result=result, **changes)


def check(*records, client=None, dtype="float32", arms=("plain", "head"), cells=(("greedy", 0.0),)):
    runs = [
        BlockRun(arm=r.arm, cell=r.cell, suite=r.suite, repeat=r.repeat, block=0, busy_sec=1.0, records=[r])
        for r in records
    ]
    cell_list = [Cell(name=name, temperature=temperature) for name, temperature in cells]
    measurement = Measurement(cells=cell_list, baseline="plain", arms=list(arms), runs=runs)
    return asyncio.run(check_greedy(measurement, client or Client(), dtype, lambda record: TEXT * 20))


def test_a_fork_is_found_and_explained():
    client = Client()
    records = [
        output("plain", [3, 4, 5]),
        output("head", [3, 9, 5]),
        output("plain", [7], "b"),
        output("head", [7], "b"),
    ]
    (row,) = check(*records, client=client)
    assert (row["arm"], row["cell"], row["greedy_identity_rate"], row["num_compared"]) == ("head", "greedy", 0.5, 2)
    (fork,) = row["forks"]
    assert client.asked == [[1, 2, 3]]  # the prompt and what both arms had in common
    assert fork.pop("margin_nats") == pytest.approx(0.01)
    assert "0.0100 nats apart" in fork.pop("why")
    assert fork == {
        "suite": "maths", "item_id": "a", "sample": 0, "turn": 0, "position": 1, "plain_token": 4, "spec_token": 9,
        "plain_text": "<4>", "spec_text": "<9>", "margin_is_lower_bound": False, "verdict": TIE,
        "prompt_excerpt": (TEXT * 20)[:160],
    }  # fmt: skip


def test_every_arm_and_greedy_cell_has_its_row():
    records = [
        output(arm, [3, 9 if (arm, cell) == ("b", "greedy c4") else 4], cell=cell)
        for arm in ("plain", "a", "b")
        for cell in ("greedy", "greedy c4", "sampled")
    ]
    cells = [("greedy", 0.0), ("sampled", 0.6), ("default", None), ("greedy c4", 0.0)]
    rows = check(*records, arms=("a", "plain", "b"), cells=cells)
    assert [(row["cell"], row["arm"], row["greedy_identity_rate"]) for row in rows] == [
        ("greedy", "a", 1.0), ("greedy", "b", 1.0), ("greedy c4", "a", 1.0), ("greedy c4", "b", 0.0),
    ]  # fmt: skip


def test_the_noise_floor_is_the_baseline_against_itself():
    records = [output("plain", [3, 4], item) for item in "abcd"] + [output("head", [3, 4], item) for item in "abcd"]
    again = [output("plain", [3, 4 + (item == "b")], item, repeat=1) for item in "abc"]
    arm_again = [output("head", [8], item, repeat=1) for item in "abcd"]  # only repeat 0 of an arm is compared
    (row,) = check(*records, *again, *arm_again)
    assert (row["greedy_identity_rate"], row["num_compared"]) == (1.0, 4)
    assert (row["noise_floor_identity_rate"], row["num_noise_floor_compared"]) == (pytest.approx(2 / 3), 3)


def test_what_can_not_be_compared_is_left_out():
    (row,) = check(
        output("plain", [3]), output("head", [4], error="timeout"),
        output("plain", [], "b"), output("head", [4], "b"),
        output("plain", [3], "c"),
    )  # fmt: skip
    assert (row["greedy_identity_rate"], row["num_compared"], row["forks"]) == (None, 0, [])
    assert row["noise_floor_identity_rate"] is None and row["tie_margin_nats"] == 0.05


def test_a_later_turn_counts_only_after_the_same_conversation():
    first = [output("plain", [3, 4]), output("head", [3, 9])]
    second = [output("plain", [5], prompt=[1, 3, 4, 6], turn=1), output("head", [6], prompt=[1, 3, 9, 6], turn=1)]
    (row,) = check(*first, *second)
    assert (row["num_compared"], len(row["forks"])) == (1, 1)
    same = [output("plain", [3], "b"), output("head", [3], "b")]
    later = [output("plain", [5], "b", prompt=[1, 3, 6], turn=1), output("head", [6], "b", prompt=[1, 3, 6], turn=1)]
    (row,) = check(*same, *later)
    assert (row["num_compared"], row["greedy_identity_rate"], row["forks"][0]["turn"]) == (2, 0.5, 1)


def test_differently_rendered_prompts_are_a_bug():
    client = Client()
    (row,) = check(output("plain", [3]), output("head", [3], prompt=[1, 2, 2]), client=client)
    (fork,) = row["forks"]
    assert row["greedy_identity_rate"] == 0 and (fork["verdict"], fork["position"]) == (BUG, -1)
    assert "different prompts" in fork["why"] and client.asked == []


def test_an_output_that_ends_early_is_a_bug():
    (fork,) = check(output("plain", [3, 4, 5]), output("head", [3, 4]))[0]["forks"]
    assert (fork["verdict"], fork["position"], fork["plain_token"]) == (BUG, 2, None)
    assert "3 tokens of the baseline, 2 of the arm" in fork["why"]


@pytest.mark.parametrize("error", [ValueError("nothing by token id"), httpx.ConnectError("gone"), {}])
def test_a_server_without_log_probabilities_leaves_the_fork_open(error):
    (fork,) = check(output("plain", [3]), output("head", [4]), client=Client(error))[0]["forks"]
    assert (fork["verdict"], fork["margin_nats"], fork["plain_token"], fork["spec_token"]) == (UNKNOWN, None, 3, 4)
    assert "no log-probabilities" in fork["why"]


def test_without_prompt_token_ids_nothing_is_asked():
    client = Client()
    (fork,) = check(output("plain", [3], prompt=()), output("head", [4], prompt=()), client=client)[0]["forks"]
    assert fork["verdict"] == UNKNOWN and client.asked == []


@pytest.mark.parametrize(
    ("logprobs", "dtype", "verdict"),
    [
        ({4: -0.5, 9: -0.7}, "bfloat16", TIE),
        ({4: -0.5, 9: -0.7}, "float32", BUG),
        ({4: -0.5, 9: -0.7}, "of another kind", BUG),
        ({4: -0.5, 5: -0.51}, "bfloat16", BUG),  # the arm's token is not among the likeliest
        ({7: -0.1, 4: -6.0, 9: -6.0}, "bfloat16", BUG),  # both tie, far below a third
    ],
)
def test_the_verdict_depends_on_margin_and_precision(logprobs, dtype, verdict):
    (row,) = check(output("plain", [4]), output("head", [9]), client=Client(logprobs), dtype=dtype)
    assert row["forks"][0]["verdict"] == verdict


def test_margins():
    assert judge_margin({4: -0.5, 9: -0.75}, 4, 9, 0.05)["margin_nats"] == pytest.approx(0.25)
    bound = judge_margin({4: -0.5, 5: -3.0}, 4, 9, 0.05)
    assert bound["margin_nats"] == pytest.approx(2.5) and bound["margin_is_lower_bound"]
    assert "at least 2.5000 nats" in bound["why"]
