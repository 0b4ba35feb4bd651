"""A worker with clocks and without the cuts: drafts as vLLM makes them by itself (``--worker-extension-cls``)."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_worker import Worker as GPUWorker

from experiments.step_anatomy import worker

worker.SPEC_PROCESS = "worker-uncut"
RejectionSampler.forward = RejectionSampler.forward.__wrapped__.__wrapped__  # of a clock, and of specdec
worker.clocks.wrap(RejectionSampler, "forward", "worker: rejection sampling")
GPUWorker.sample_tokens = GPUWorker.sample_tokens.__wrapped__  # the engine asks for the drafts
rejection_sampler.sample_recovered_tokens = rejection_sampler.sample_recovered_tokens.__wrapped__
greedy_sample = SpecDecodeBaseProposer._greedy_sample


def over_all_tokens(self: Any, hidden_states: Any) -> Any:
    """The argmax over logits that were spread over the target's whole vocabulary."""
    self.use_local_argmax_reduction = False
    return greedy_sample(self, hidden_states)


SpecDecodeBaseProposer._greedy_sample = over_all_tokens  # type: ignore[method-assign]


class Worker:
    """Adds nothing: importing this module is what counts."""
