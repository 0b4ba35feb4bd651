"""Clocks in the worker (``--worker-extension-cls experiments.step_anatomy.worker.Worker``)."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from experiments.step_anatomy.clocks import Clocks

clocks = Clocks("worker")
SPEC_PROCESS = "worker-spec"
for owner, name, label in (
    (GPUModelRunner, "execute_model", "worker: rest of execute"),
    (GPUModelRunner, "sample_tokens", "worker: rest of sampling"),
    (GPUModelRunner, "_update_states", "worker: batch state"),
    (GPUModelRunner, "_prepare_inputs", "worker: inputs"),
    (GPUModelRunner, "_build_attention_metadata", "worker: attention metadata"),
    (GPUModelRunner, "_preprocess", "worker: inputs"),
    (GPUModelRunner, "_model_forward", "target: forward"),
    (GPUModelRunner, "_sample", "worker: sampling"),
    (RejectionSampler, "forward", "worker: rejection sampling"),
    (GPUModelRunner, "_bookkeeping_sync", "worker: bookkeeping"),
    (GPUModelRunner, "propose_draft_token_ids", "head: inputs"),
    (SpecDecodeBaseProposer, "propose", "head: loop around the forwards"),
    (SpecDecodeBaseProposer, "build_per_group_and_layer_attn_metadata", "head: attention metadata"),
    (SpecDecodeBaseProposer, "_sample_draft_tokens", "head: logits and argmax"),
    (GPUModelRunner, "_copy_draft_token_ids_to_cpu", "head: drafts to the scheduler"),
    (GPUModelRunner, "take_draft_token_ids", "head: drafts to the scheduler"),
):
    clocks.wrap(owner, name, label)

execute_model, load_model = GPUModelRunner.execute_model, CPUModelRunner.load_model


@functools.wraps(execute_model)
def execute(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    clocks.begin(scheduled)
    return execute_model(self, scheduled, *args, **kwargs)


@functools.wraps(load_model)
def load(self: Any, *args: Any, **kwargs: Any) -> None:
    load_model(self, *args, **kwargs)
    clocks.wrap(self.get_model(), "compute_logits", "target: logits")
    clocks.process = "worker-plain"
    if getattr(self, "drafter", None) is not None and hasattr(self.drafter, "model"):
        clocks.process = SPEC_PROCESS
        clocks.wrap(self.drafter.model, "forward", "head: forward")
        if hasattr(self.drafter.model, "combine_hidden_states"):
            clocks.wrap(self.drafter.model, "combine_hidden_states", "head: fusion of the features")


GPUModelRunner.execute_model, CPUModelRunner.load_model = execute, load  # type: ignore[method-assign]


class Worker:
    """Adds nothing: importing this module is what counts."""
