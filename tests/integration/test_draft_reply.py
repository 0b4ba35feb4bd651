"""Drafts ride on the worker's answer: the engine gets the same ones, and asks only for those that did not come."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from serving.draft_reply import from_kept, keeping_drafts, with_drafts


@pytest.fixture(scope="module")
def outputs():
    return pytest.importorskip("vllm.v1.outputs", reason="needs vLLM")


class Executor:
    """As vLLM's, with a pipe's pickling between engine and worker."""

    def __init__(self, worker) -> None:
        self.worker, self.num_questions = worker, 0

    @keeping_drafts
    def sample_tokens(self, grammar_output):
        return pickle.loads(pickle.dumps(with_drafts(lambda worker, _: worker.output)(self.worker, grammar_output)))

    @from_kept
    def take_draft_token_ids(self):
        self.num_questions += 1
        return "asked"


def worker_with(output, drafts):
    return SimpleNamespace(output=output, take_draft_token_ids=lambda: drafts)


def test_one_answer_brings_both(outputs):
    drafts = outputs.DraftTokenIds(["a"], [[5, 6]])
    executor = Executor(worker_with(outputs.ModelRunnerOutput(["a"], {"a": 0}, [[4]]), drafts))
    assert executor.sample_tokens(None).sampled_token_ids == [[4]]
    assert executor.take_draft_token_ids() == drafts and executor.num_questions == 0
    assert executor.take_draft_token_ids() == "asked", "kept for one step"


def test_no_drafts_is_an_answer_too(outputs):
    executor = Executor(worker_with(outputs.ModelRunnerOutput(["a"], {"a": 0}, [[4]]), None))
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() is None and executor.num_questions == 0


def test_what_carries_none_is_asked_for_and_nothing_old_is_taken(outputs):
    executor = Executor(worker_with(outputs.ModelRunnerOutput(["a"], {"a": 0}, [[4]]), "old"))
    executor.sample_tokens(None)
    for output in (None, outputs.EMPTY_MODEL_RUNNER_OUTPUT):
        executor.worker = worker_with(output, "never taken")
        executor.sample_tokens(None)
        assert executor.take_draft_token_ids() == "asked"
    assert not hasattr(outputs.EMPTY_MODEL_RUNNER_OUTPUT, "specdec_drafts")


def test_vllm_has_what_is_wrapped():
    executor = pytest.importorskip("vllm.v1.executor.multiproc_executor").MultiprocExecutor
    worker = pytest.importorskip("vllm.v1.worker.gpu_worker").Worker
    assert {"sample_tokens", "take_draft_token_ids"} <= vars(executor).keys() & vars(worker).keys()
    cpu_worker = pytest.importorskip("vllm.v1.worker.cpu_worker").CPUWorker
    assert cpu_worker.sample_tokens is worker.sample_tokens, "the CPU's inherits it"
