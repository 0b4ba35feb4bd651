"""Drafts come with the sampled tokens, in one answer of the worker instead of two, and with how likely they are.

After each synchronous step vLLM 0.32's engine asks the worker's process for the drafts, also at K = 0, where there are
none. On a CPU, whose cores the worker keeps busy, that question takes longer than drafting a token
(``experiments/step_anatomy``).
What is not as expected (an answer that comes later, or was merged from several workers) is asked for as before.
"""

from __future__ import annotations

import functools
from typing import Any

from serving.confidence import NAME as CONFIDENCE
from serving.confidence import fail, taken_from

NAME = "specdec_drafts"


def with_drafts(sample_tokens: Any) -> Any:
    """The worker's ``sample_tokens``, whose output also carries what ``take_draft_token_ids`` would answer."""

    @functools.wraps(sample_tokens)
    def sample(worker: Any, grammar_output: Any) -> Any:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

        output = sample_tokens(worker, grammar_output)
        if type(output) is ModelRunnerOutput and output is not EMPTY_MODEL_RUNNER_OUTPUT:  # that one is everybody's
            setattr(output, NAME, with_log_probs(worker, worker.take_draft_token_ids()))
        return output

    return sample


def with_log_probs(worker: Any, drafts: Any) -> Any:
    """The drafts, which also carry how likely they are, where the worker's drafter has left that."""
    drafter = getattr(getattr(worker, "model_runner", None), "drafter", None)
    if drafter is not None and hasattr(drafts, "draft_token_ids"):
        try:
            setattr(drafts, CONFIDENCE, taken_from(drafter, drafts.draft_token_ids))
        except Exception as error:
            fail(drafter, error)
    return drafts


def keeping_drafts(sample_tokens: Any) -> Any:
    """The executor's ``sample_tokens``, which keeps the drafts that an output carries."""

    @functools.wraps(sample_tokens)
    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample_tokens(executor, *args, **kwargs)
        vars(executor).pop(NAME, None)
        if hasattr(output, NAME):
            setattr(executor, NAME, getattr(output, NAME))
        return output

    return sample


def from_kept(take_draft_token_ids: Any) -> Any:
    """The executor's ``take_draft_token_ids``, which asks the worker only for drafts that did not come."""

    @functools.wraps(take_draft_token_ids)
    def take(executor: Any) -> Any:
        if NAME in vars(executor):
            return vars(executor).pop(NAME)
        return take_draft_token_ids(executor)

    return take
