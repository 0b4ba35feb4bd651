"""The control on vLLM's own two schedulers, of which a CPU server only ever runs the synchronous one.

Real schedulers, requests and KV blocks; the worker is a stand-in that knows what comes next and how much of a draft it
accepts. Asynchronously a step is scheduled before the last one's tokens are known, drafts are placeholders.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from serving.scheduler import POLICY_VARIABLE, command, make_scheduler
from tests.tiny import save_tiny_target

K = 3
NUM_TOKENS = 40
WISHES = {"auto": None, "one": 1, "off": "off"}
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason="needs vLLM")
    return save_tiny_target(tmp_path_factory.mktemp("tiny"))


def real_scheduler(target: Path, is_async: bool) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    speculative = {"method": "ngram", "num_speculative_tokens": K, "prompt_lookup_max": 3}
    arguments = EngineArgs(
        model=str(target), max_model_len=128, max_num_seqs=4, enable_prefix_caching=False,
        speculative_config=speculative,
    )  # fmt: skip
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = is_async  # the CPU platform has turned it off
    config.cache_config.num_gpu_blocks = 64
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32)
    blocks = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return make_scheduler(
        config, kv_cache_config=blocks, structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS, log_stats=True,
    )  # fmt: skip


class Worker:
    """Puts out 100, 101, ... for each request and accepts 0, 1, 2, ... tokens of its drafts, in turn."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.said = dict.fromkeys(WISHES, 0)
        self.num_drafts = dict.fromkeys(WISHES, 0)
        self.lengths: dict[str, list[int]] = {name: [] for name in WISHES}  # of each request's drafts
        self.num_accepted = 0  # of requests that had not ended

    def work(self, scheduled: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        names, sampled = list(scheduled.num_scheduled_tokens), []
        for name in names:
            length = len(scheduled.scheduled_spec_decode_tokens.get(name, ()))
            accepted = min(length, self.num_drafts[name] % (K + 1))
            if length and name in self.scheduler.requests:
                self.num_drafts[name] += 1
                self.lengths[name].append(length)
                self.num_accepted += accepted
            sampled.append([100 + self.said[name] + i for i in range(accepted + 1)])
            self.said[name] += accepted + 1
        return ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)}, sampled_token_ids=sampled
        )


def run(scheduler: Any, worker: Worker, num_in_flight: int, num_steps: int = 1000) -> None:
    """As the engine's loop does: so many steps are scheduled at a time."""
    from vllm.v1.outputs import DraftTokenIds

    steps: deque[Any] = deque()
    while num_steps and (scheduler.has_unfinished_requests() or steps):
        if len(steps) < num_in_flight and (step := scheduler.schedule()).total_num_scheduled_tokens:
            steps.append(step)
            if len(steps) < num_in_flight:
                continue
        done = steps.popleft()
        output = worker.work(done)
        scheduler.update_from_output(done, output)
        if num_in_flight == 1:
            width = done.num_spec_tokens_to_schedule
            scheduler.update_draft_token_ids(DraftTokenIds(output.req_ids, [[7] * width for _ in output.req_ids]))
        num_steps -= 1
    for step in steps:
        scheduler.update_from_output(step, worker.work(step))


@pytest.mark.parametrize("is_async", [False, True])
def test_either_base_drafts_what_policy_and_request_say_and_counts_it(monkeypatch, target, is_async):
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.request import Request

    monkeypatch.setenv(POLICY_VARIABLE, json.dumps({"policy": f"fixed:{K}"}))
    scheduler = real_scheduler(target, is_async)
    assert isinstance(scheduler, AsyncScheduler) == is_async
    requests = {}
    for name, wish in WISHES.items():
        extra = None if wish is None else {"specdec": wish}
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=extra)
        requests[name] = Request(name, [3, 4, 5], sampling, None)
        scheduler.add_request(requests[name])
    worker, num_in_flight = Worker(scheduler), 2 if is_async else 1
    run(scheduler, worker, num_in_flight, num_steps=10)
    before = {name: set(lengths) for name, lengths in worker.lengths.items()}
    assert before == {"auto": {K}, "one": {1}, "off": set()}
    command(scheduler, '{"command": "policy", "policy": "fixed:2"}')
    worker.lengths["auto"].clear()
    run(scheduler, worker, num_in_flight)
    assert set(worker.lengths["auto"][num_in_flight:]) == {2} and set(worker.lengths["one"]) == {1}
    for name, request in requests.items():
        assert list(request.output_token_ids) == list(range(100, 100 + NUM_TOKENS)), name
    status = json.loads(command(scheduler, '{"command": "status"}'))
    assert status["totals"]["policy_failures"] == 0 and status["mode"] == "fixed"
    assert status["totals"]["num_drafts"] == sum(worker.num_drafts.values())
    assert status["totals"]["num_accepted_tokens"] == worker.num_accepted
