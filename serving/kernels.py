"""Matrix kernels of decode steps, made before anyone waits for them; on CPU only.

vLLM's linear layers call oneDNN there, which makes a kernel for each number of rows that a kind of matrix meets; a step
with a head has seven kinds. The first step of so many tokens takes some 20 ms longer for it than later ones (4 to 32
sequences, ``experiments/LOG.md``). A fixed K soon has its own kernels. A K that is on trial for a few steps has them
not, and looked a quarter slower than it is, at 16 sequences, where the K differ by less than that. Nor does it keep
them: vLLM 0.32 holds 32 numbers of rows of each kind, and steps that also read prompts bring ever new ones.

So those of decode steps of every K are made at start-up, in two seconds for a small target, and more are kept.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger("vllm.specdec")

ROWS_KEPT = 160  # numbers of rows, of each kind of matrix; 0.5 MB each
SHARED_KEPT = 256  # kernels that oneDNN keeps of its own, beside these; by itself 1,024
MOST_ROWS = 128  # of a step whose kernels are made at start-up,
LONGEST_SEC = 5.0  # within so long: beside the steps of a large model what they take is little
_matrices: weakref.WeakSet[Any] = weakref.WeakSet()  # vLLM's handlers


def keep_fewer_twice() -> None:
    """So that more kernels of each kind take no more memory than vLLM's few and oneDNN's many; before oneDNN begins."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(SHARED_KEPT))


def with_more_rows(create: Any) -> Any:
    """``vllm._custom_ops.create_onednn_mm``, which keeps more kernels and notes what it was called for."""

    @functools.wraps(create)
    def create_noted(weight: Any, primitive_cache_size: int = ROWS_KEPT) -> Any:
        handler = create(weight, max(primitive_cache_size, ROWS_KEPT))
        handler.dtype = weight.dtype
        _matrices.add(handler)
        return handler

    return create_noted


def with_kernels(compile_model: Any) -> Any:
    """The runner's ``warming_up_model``, after which the kernels of its decode steps are there."""

    @functools.wraps(compile_model)
    def compile_and_make(runner: Any) -> None:
        compile_model(runner)
        speculation, scheduling = runner.vllm_config.speculative_config, runner.vllm_config.scheduler_config
        width = speculation.num_speculative_tokens if speculation is not None else 0
        try:
            make(rows_of_decode_steps(scheduling.max_num_seqs, width))
        except RuntimeError as error:
            logger.warning("specdec: kernels of decode steps are made as they come: %s", error)

    return compile_and_make


def rows_of_decode_steps(max_num_seqs: int, max_draft_tokens: int) -> list[int]:
    """How many tokens a step may have, up to ``MOST_ROWS``: any number, where only some of the drafts are verified."""
    return list(range(1, min(MOST_ROWS, max_num_seqs * (1 + max_draft_tokens)) + 1))


def make(rows: Iterable[int]) -> None:
    """Use each kind of matrix once with each number of rows, until ``LONGEST_SEC`` are over."""
    import torch
    from vllm import _custom_ops

    begun_sec = time.monotonic()
    of_each_kind = {(handler.k, handler.n, handler.dtype): handler for handler in _matrices}.values()
    for number in rows:
        if time.monotonic() - begun_sec > LONGEST_SEC:
            logger.info("specdec: those of %d tokens a step and more are made as they come", number)
            break
        for handler in of_each_kind:
            _custom_ops.onednn_mm(handler, torch.zeros(number, handler.k, dtype=handler.dtype), None)
    logger.info("specdec: kernels of %d kinds of matrices in %.1f s", len(of_each_kind), time.monotonic() - begun_sec)
