"""A vLLM general plugin for two things on CPU. vLLM loads it in each of its processes.

**Sampling under speculation.** vLLM 0.32's CPU stand-in for the kernel that spreads per-request values over draft
tokens converts its *output* to int64 first: temperatures and top-p, being float32, are written into a copy, and the
rejection sampler then divides by uninitialised memory. Greedy decoding never comes there; at temperature > 0 nearly
every draft is rejected, and what is sampled does not follow the target's distribution.

**Compiling beside another server.** The worker's main thread, which compiles alone for a minute or two, is pinned to
the first of its cores. Servers that start together on the same cores would compile there one after the other.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; may run many times, changes nothing off the CPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.utils import cpu_triton_utils

    # The worker registers this module's kernels right after it loads the plugins, and looks them up by name.
    cpu_triton_utils._expand_kernel_impl = expand
    if multiprocessing.current_process().name.startswith("VllmWorker"):  # only there is the runner's import not wasted
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        CPUModelRunner.warming_up_model = unpinned(CPUModelRunner.warming_up_model)


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


def expand(
    output: Any, values: Any, cu_num_tokens: Any, replace_from: float, replace_to: float, MAX_NUM_TOKENS: Any = None
) -> None:
    """Write ``values[i]``, ``replace_from`` replaced, to the tokens of request i; any dtype, in place."""
    import torch

    counts = torch.diff(cu_num_tokens.to(torch.int64), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts))
