"""A vLLM general plugin: what the engine and its workers need beyond vLLM's own options. It runs in each process.

**Questions.** The engine answers ``specdec`` (status, policy, another head), which the HTTP endpoints pass on.

**Plain decode without the head's forward** (``serving/catch_up.py``; ``serving/resting_speculator.py`` on a GPU).

**Drafts with the sampled tokens**, where the worker is a process of its own (``serving/draft_reply.py``).

**Medusa and suffix lookup.** With any number of draft tokens: vLLM 0.32's proposers take only the number they were
started with. And Medusa with a truncated vocabulary: vLLM 0.32 makes the file's ``token_map`` a parameter while it
loads, does not count it as loaded, and then refuses the head because a parameter is missing from its file.

On CPU also:

**Sampling under speculation.** vLLM 0.32's CPU stand-in for the kernel that spreads per-request values over draft
tokens converts its *output* to int64 first: temperatures and top-p, being float32, are written into a copy, and the
rejection sampler then divides by uninitialised memory. Greedy decoding never comes there; at temperature > 0 nearly
every draft is rejected, and what is sampled does not follow the target's distribution.

**Seeds.** After each part of a prompt that is prefilled in chunks, vLLM 0.32 rewinds the request's generator. A CPU
generator has no offset: the exception ends the engine.

**Top-p without sorting the vocabulary** (``serving/nucleus.py``), in servers and offline engines.

**Verification without copies, with quicker noise, and only of drafts** (``serving/verification.py``).

**How likely the drafts are** (``serving/confidence.py``), so that those which hardly pay are not verified.

**Synthetic acceptance** (``serving/synthetic.py``), which vLLM has kernels for on a GPU alone.

**Kernels of decode steps** (``serving/kernels.py``), made at start-up.

**Compiling beside another server.** The worker's main thread, which compiles alone for a minute or two, is pinned to
the first of its cores. Servers that start together on the same cores would compile there one after the other.

**Compiling without garbage.** Loading a head leaves oneDNN handlers behind in reference cycles. Their destructor calls
``item()``; where a collection happens to run it in the middle of a trace, whose tensors have no values, vLLM 0.32's
worker recurses in the error's own message until Python aborts.
"""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing
import os
import sys
from typing import Any

from serving.catch_up import with_catch_up
from serving.confidence import with_confidence
from serving.draft_reply import from_kept, keeping_drafts, with_drafts
from serving.kernels import keep_fewer_twice, with_kernels, with_more_rows
from serving.nucleus import without_sort
from serving.plain_draws import by_plain_draws
from serving.resting_speculator import with_rest
from serving.synthetic import with_synthetic
from serving.verification import (
    as_plain_step,
    by_one_argmax,
    with_nothing_to_verify,
    with_one_token_each,
    with_quick_noise,
)

logger = logging.getLogger("vllm.specdec")


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may run many times."""
    from vllm.platforms import current_platform

    if (core := sys.modules.get("vllm.v1.engine.core")) is not None:  # loaded in the engine's process alone
        core.EngineCore.specdec = answer
        _patch_executor()
    process = multiprocessing.current_process().name
    in_worker = process.startswith("VllmWorker")
    # Only where a worker lives are the runners' imports not wasted; a single GPU's lives in the engine's process.
    if in_worker or (process.startswith("EngineCore") and not current_platform.is_cpu()):
        try:
            _patch_runner()
            if not current_platform.is_cpu():
                _patch_speculator()
        except (ImportError, AttributeError) as error:
            logger.error("specdec: speculation stays as vLLM has it: %s", error)
    if not current_platform.is_cpu():
        return
    from vllm.utils import cpu_triton_utils

    # The worker registers this module's kernels right after it loads the plugins, and looks them up by name.
    cpu_triton_utils._expand_kernel_impl = expand
    _patch_rejection(cpu_triton_utils)
    if in_worker:
        _patch_cpu_runner()
        _patch_top_p()
        _patch_verification()


def answer(engine: Any, request: str) -> str:
    """``EngineCore.specdec``: see ``serving.head_swap.answer``."""
    from serving import head_swap

    return head_swap.answer(engine, request)


def _patch_executor() -> None:
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    if not hasattr(MultiprocExecutor.take_draft_token_ids, "__wrapped__"):  # else: loaded before
        MultiprocExecutor.sample_tokens = keeping_drafts(MultiprocExecutor.sample_tokens)
        MultiprocExecutor.take_draft_token_ids = from_kept(MultiprocExecutor.take_draft_token_ids)


def _patch_runner() -> None:
    from vllm.model_executor.models.medusa import Medusa
    from vllm.v1.spec_decode.medusa import MedusaProposer
    from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(GPUModelRunner.propose_draft_token_ids, "__wrapped__"):  # else: loaded before
        GPUModelRunner.propose_draft_token_ids = with_catch_up(GPUModelRunner.propose_draft_token_ids)
        MedusaProposer.propose = any_width(MedusaProposer.propose)
        SuffixDecodingProposer.propose = any_length(SuffixDecodingProposer.propose)
        Medusa.load_weights = with_token_map(Medusa.load_weights)
        Worker.sample_tokens = with_drafts(Worker.sample_tokens)


def _patch_speculator() -> None:
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import TargetDependentARSpeculator

    if not hasattr(TargetDependentARSpeculator.propose, "specdec"):  # else: loaded before
        TargetDependentARSpeculator.propose = with_rest(TargetDependentARSpeculator.propose)
        TargetDependentARSpeculator.propose.specdec = True


def _patch_cpu_runner() -> None:
    from vllm import _custom_ops
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    keep_fewer_twice()
    if not hasattr(_custom_ops.create_onednn_mm, "__wrapped__"):  # else: loaded before
        CPUModelRunner.warming_up_model = with_kernels(without_garbage(unpinned(CPUModelRunner.warming_up_model)))
        CPUModelRunner._bookkeeping_sync = with_restarted_generators(CPUModelRunner._bookkeeping_sync)
        _custom_ops.create_onednn_mm = with_more_rows(_custom_ops.create_onednn_mm)


def _patch_top_p() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    if not hasattr(topk_topp_sampler.apply_top_k_top_p_pytorch, "__wrapped__"):  # else: loaded before
        topk_topp_sampler.apply_top_k_top_p_pytorch = without_sort(topk_topp_sampler.apply_top_k_top_p_pytorch)


def _patch_rejection(kernels: Any) -> None:
    if not hasattr(kernels._rejection_greedy_sample_kernel_impl, "__wrapped__"):  # else: loaded before
        kernels._rejection_greedy_sample_kernel_impl = with_synthetic(
            kernels._rejection_greedy_sample_kernel_impl, greedy=True, instead="target_argmax"
        )
        kernels._rejection_random_sample_kernel_impl = with_synthetic(
            kernels._rejection_random_sample_kernel_impl, greedy=False, instead="recovered_token_ids"
        )


def _patch_verification() -> None:
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if not hasattr(RejectionSampler.forward, "__wrapped__"):  # else: loaded before
        RejectionSampler.forward = by_one_argmax(by_plain_draws(RejectionSampler.forward))
        rejection_sampler.sample_recovered_tokens = with_quick_noise(rejection_sampler.sample_recovered_tokens)
        GPUModelRunner._calc_spec_decode_metadata = with_nothing_to_verify(GPUModelRunner._calc_spec_decode_metadata)
        GPUModelRunner._prepare_inputs = as_plain_step(GPUModelRunner._prepare_inputs)
        prepare = SpecDecodeBaseProposer.prepare_next_token_ids_padded
        SpecDecodeBaseProposer.prepare_next_token_ids_padded = with_one_token_each(prepare)
        SpecDecodeBaseProposer._greedy_sample = with_confidence(SpecDecodeBaseProposer._greedy_sample)


def any_width(propose: Any) -> Any:
    """Medusa's ``propose`` for any number of draft tokens up to its heads: they draft all, the first ones stay."""

    @functools.wraps(propose)
    def first_drafts(proposer: Any, num_speculative_tokens: int, target_hidden_states: Any, *args: Any, **kwargs: Any):
        if num_speculative_tokens == 0:
            return target_hidden_states.new_empty((len(target_hidden_states), 0), dtype=int)
        drafts = propose(proposer, proposer.num_speculative_tokens, target_hidden_states, *args, **kwargs)
        return drafts[:, :num_speculative_tokens]

    return first_drafts


def any_length(propose: Any) -> Any:
    """Suffix lookup's ``propose`` for any number of draft tokens: its tree reads what was sampled in every step."""

    @functools.wraps(propose)
    def first_drafts(proposer: Any, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> list[list[int]]:
        drafts = propose(proposer, proposer.num_speculative_tokens, *args, **kwargs)
        return [tokens[:num_speculative_tokens] for tokens in drafts]

    return first_drafts


def with_token_map(load_weights: Any) -> Any:
    """Medusa's ``load_weights``, which then also names the ``token_map`` that it has loaded."""

    @functools.wraps(load_weights)
    def load(model: Any, weights: Any) -> set[str]:
        loaded: set[str] = load_weights(model, weights)
        return loaded if model.token_map is None else loaded | {"token_map"}

    return load


def unpinned(compile_model: Any) -> Any:
    """``compile_model`` with the calling thread on any core that its parent process may use, and pinned again after."""

    @functools.wraps(compile_model)
    def on_any_core(runner: Any) -> None:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
        try:
            compile_model(runner)
        finally:
            os.sched_setaffinity(0, cores)

    return on_any_core


def without_garbage(compile_model: Any) -> Any:
    """``compile_model`` after a garbage collection."""

    @functools.wraps(compile_model)
    def collected(runner: Any) -> None:
        gc.collect()
        compile_model(runner)

    return collected


def with_restarted_generators(bookkeeping: Any) -> Any:
    """The runner's ``_bookkeeping_sync``, which leaves the generators of requests whose token is discarded to us.

    One that has produced nothing starts over, so that chunks do not change what a seed gives. One that is prefilled
    again after a preemption keeps what it has drawn: the same numbers again would follow from its own tokens.
    """

    @functools.wraps(bookkeeping)
    def keep_books(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        is_discarded = runner.discard_request_mask.np[: batch.num_reqs]
        ours = {i: batch.generators.pop(i) for i in list(batch.generators) if is_discarded[i]}
        for i, generator in ours.items():
            if not runner.requests[batch.req_ids[i]].output_token_ids:
                generator.manual_seed(generator.initial_seed())
        try:
            return bookkeeping(runner, *args, **kwargs)
        finally:
            batch.generators.update(ours)

    return keep_books


def expand(
    output: Any, values: Any, cu_num_tokens: Any, replace_from: float, replace_to: float, MAX_NUM_TOKENS: Any = None
) -> None:
    """Write ``values[i]``, ``replace_from`` replaced, to the tokens of request i; any dtype, in place."""
    import torch

    counts = torch.diff(cu_num_tokens.to(torch.int64), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts))
