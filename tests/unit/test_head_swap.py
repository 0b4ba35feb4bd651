"""A swap as the engine does it: all workers or none, watched, and back by itself. The workers are stand-ins."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from serving import head_weights
from serving.control import Control
from serving.head_swap import answer
from serving.monitor import Monitor
from serving.policy import Policy

K = 2
STATUS = json.dumps({"command": "status"})


class Workers:
    """Stands for the executor: each worker notes what it is told, and may refuse."""

    def __init__(self, count: int) -> None:
        self.told: list[tuple[str, tuple]] = []
        self.count = count
        self.refusing: dict[str, str] = {}  # what the last worker refuses, and why

    def collective_rpc(self, method: Any, args: tuple = ()) -> list[str | None]:
        self.told.append((method.__name__, args))
        return [None] * (self.count - 1) + [self.refusing.get(method.__name__)]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.told]


def engine(control: Control | None = None, parallel: int = 1) -> Any:
    evicted: list[set[int]] = []
    manager = SimpleNamespace(block_pool=SimpleNamespace(blocks=[None] * 5), evict_blocks=evicted.append)
    scheduler = SimpleNamespace(
        specdec=control, specdec_reports=control, specdec_failure=None, requests={"old": None}, num_spec_tokens=K,
        kv_cache_manager=manager, evicted=evicted,
    )  # fmt: skip
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=parallel, pipeline_parallel_size=1))
    return SimpleNamespace(scheduler=scheduler, model_executor=Workers(2), vllm_config=config)


@pytest.fixture
def control() -> Control:
    rates = [0.9, 0.8]
    return Control(Policy(K, rates), Monitor(K, rates), trained_rates=rates)


def order(name: str, rates=(0.7, 0.5), method: str = "eagle3") -> str:
    head = {"head": "eagle3", "head_dir": f"/heads/{name}", "method": method, "conditional_rates": list(rates)}
    return json.dumps({"command": "swap", **head, "layout": {"w": ["F32", [1]]}, "running": "/heads/first"})


def draft(control: Control, num_drafts: int, num_accepted: int, name: str = "new") -> None:
    for i in range(num_drafts):
        request_id = name if name == "old" else f"{name} {i // 20}"
        request = SimpleNamespace(request_id=request_id, prompt_token_ids=[1], output_token_ids=[2])
        control.drafted(request, K, num_accepted)
        control.ended(1, lambda _: True)


def ask(engine: Any, request: str) -> dict[str, Any]:
    return json.loads(answer(engine, request))


def test_the_new_head_is_read_by_all_before_it_is_copied_and_its_figures_count(control):
    draft(control, 100, 2)
    found = engine(control)
    status = ask(found, order("new"))
    assert found.model_executor.told == [("read", ("/heads/new", {"w": ["F32", [1]]})), ("replace", ())]
    assert (status["head"], status["head_dir"], status["acceptance_length"]) == ("eagle3", "/heads/new", None)
    assert status["swap"] == {"from": "/heads/first", "to": "/heads/new", "state": "watched", "reason": None}
    assert status["trained"]["conditional_rates"] == [0.7, 0.5]
    assert control.policy is not None and control.policy.acceptance.conditional_rates == pytest.approx([0.7, 0.5])
    assert control.monitor.drift.trained == [0.7, 0.5]
    assert status["totals"]["num_drafts"] == 100, "counters never fall"
    assert status["events"][-1]["kind"] == "head"
    assert found.scheduler.evicted == [{0, 1, 2, 3, 4}]


def test_a_head_that_is_as_good_is_kept_and_the_old_one_let_go(control, caplog):
    caplog.set_level(logging.INFO, logger="vllm.specdec")
    draft(control, 300, 2)
    found = engine(control)
    ask(found, order("new"))
    draft(control, 300, 2)
    swap = ask(found, STATUS)["swap"]
    assert swap["state"] == "kept" and "the acceptance length went from 3.00 to 3.00" in swap["reason"]
    assert found.model_executor.names == ["read", "replace", "settle"]
    assert "/heads/new is kept" in caplog.text


def test_a_worse_head_is_taken_back_with_an_event_a_reason_and_a_line_in_the_log(control, caplog):
    draft(control, 300, 2)
    found = engine(control)
    ask(found, order("bad"))
    draft(control, 500, 0, name="old")  # keys of the old head: no evidence
    assert ask(found, STATUS)["swap"]["state"] == "watched"
    draft(control, 100, 0)
    status = ask(found, STATUS)
    assert found.model_executor.names == ["read", "replace", "take_back"]
    assert "head" not in status and "head_dir" not in status, "the launcher knows the head that the server started with"
    assert status["swap"]["state"] == "taken back" and "fell from 3.00 to 1.00" in status["swap"]["reason"]
    events = [event["what"] for event in status["events"] if event["kind"] == "head"]
    assert events[-1].startswith("/heads/bad is taken back for /heads/first: ")
    assert "/heads/bad is taken back for /heads/first" in caplog.text
    assert status["trained"]["conditional_rates"] == [0.9, 0.8] and control.monitor.drift.trained == [0.9, 0.8]
    assert len(found.scheduler.evicted) == 2
    draft(control, 500, 0)
    assert found.model_executor.names == ["read", "replace", "take_back"]


def test_the_way_back_leads_to_the_last_head_that_was_good(control):
    draft(control, 300, 2)
    found = engine(control)
    ask(found, order("better"))
    draft(control, 300, 2)  # kept
    ask(found, order("bad"))
    ask(found, order("worse"))
    draft(control, 100, 0)
    status = ask(found, STATUS)
    assert (status["head_dir"], status["swap"]["from"]) == ("/heads/better", "/heads/better")
    assert status["trained"]["conditional_rates"] == [0.7, 0.5]
    draft(control, 300, 2)
    ask(found, order("bad"))
    draft(control, 100, 0)
    assert ask(found, STATUS)["head_dir"] == "/heads/better", "what it drafted before still counts"


@pytest.mark.parametrize(("step", "told"), [("read", ["read"]), ("replace", ["read", "replace", "take_back"])])
def test_one_worker_that_can_not_leaves_the_old_head_in_all(control, step, told):
    draft(control, 300, 2)
    found = engine(control)
    found.model_executor.refusing[step] = "the file is torn"
    assert ask(found, order("new")) == {"error": "the file is torn"}
    assert found.model_executor.names == told
    status = ask(found, STATUS)
    assert status["swap"] is None and "head_dir" not in status and status["acceptance_length"] == 3.0
    assert control.watch is None and control.trained_rates == [0.9, 0.8]


def test_a_copy_that_fails_under_a_watch_ends_at_the_head_before(control):
    draft(control, 300, 2)
    found = engine(control)
    ask(found, order("bad"))
    found.model_executor.refusing["replace"] = "out of memory"
    assert "out of memory" in ask(found, order("other"))["error"]
    status = ask(found, STATUS)
    assert status["swap"]["state"] == "taken back" and "head_dir" not in status
    assert control.watch is None and control.trained_rates == [0.9, 0.8]


def test_medusa_keeps_no_keys_so_every_request_counts_and_no_prefix_is_lost(control):
    draft(control, 300, 2)
    found = engine(control)
    ask(found, order("bad", method="medusa"))
    assert found.scheduler.evicted == []
    draft(control, 30, 0, name="old")
    draft(control, 100, 0)
    assert ask(found, STATUS)["swap"]["reason"].endswith("in 64 drafts")


def test_a_server_that_does_not_watch_swaps_and_says_so():
    for control in (None, Control(None, Monitor(0))):
        found = engine(control)
        status = ask(found, order("new"))
        assert status["head_dir"] == "/heads/new" and status["swap"]["state"] == "unwatched"
        assert "no way back" in status["swap"]["reason"]
        assert found.model_executor.names == ["read", "replace", "settle"]


def test_several_engines_swap_nothing(control):
    found = engine(control, parallel=2)
    assert "restart it" in ask(found, order("new"))["error"] and found.model_executor.told == []


def test_questions_never_raise(control):
    found = engine(control)
    for bad in ("no json", "{}", '{"command": "swap"}', "[]"):
        assert ask(found, bad)["error"]
    del found.model_executor
    assert ask(found, order("new"))["error"]


def test_a_cache_that_can_not_be_emptied_is_no_reason_not_to_swap(control, caplog):
    found = engine(control)
    del found.scheduler.kv_cache_manager
    assert ask(found, order("new"))["head_dir"] == "/heads/new"
    assert "the prefix cache was not emptied" in caplog.text


def test_the_workers_functions_can_be_sent_to_them():
    """By name: a worker imports the module itself."""
    import pickle

    for work in (head_weights.read, head_weights.replace, head_weights.take_back, head_weights.settle):
        assert pickle.loads(pickle.dumps(work)) is work
