"""How sure the head is of its drafts, so that those which hardly pay are not verified; on CPU only.

The head's own probability of a draft token says how likely the target accepts it (as in EAGLE-2, Li et al. 2024, which
builds its trees by it). vLLM 0.32 takes the argmax and drops the rest. Here the worker adds to each draft token the
product of its probability and of those before it in the draft; which are verified is decided where the steps are
scheduled (``serving/draft_cut.py``).

For heads with a draft vocabulary of their own, of some thousand tokens: over a target's whole vocabulary the
probabilities would take longer than they save.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger("vllm.specdec")

NAME, FAILED = "specdec_log_probs", "specdec_no_log_probs"


def with_confidence(greedy_sample: Any) -> Any:
    """The proposer's ``_greedy_sample``, which also leaves the log probabilities of its tokens, one tensor a call."""

    @functools.wraps(greedy_sample)
    def sample(drafter: Any, hidden_states: Any) -> Any:
        model = drafter.model
        offsets: Any = getattr(model, "draft_id_to_target_id", None)
        is_understood = offsets is not None and drafter.use_local_argmax_reduction and model.lm_head.tp_size == 1
        if not is_understood or hasattr(drafter, FAILED):
            return greedy_sample(drafter, hidden_states)
        try:
            logits = model.logits_processor(model.lm_head, hidden_states)
            best, ids = logits.max(dim=-1)
            vars(drafter).setdefault(NAME, []).append(best.float() - logits.float().logsumexp(dim=-1))
            return ids + offsets[ids]
        except Exception as error:
            fail(drafter, error)
            return greedy_sample(drafter, hidden_states)

    return sample


def fail(drafter: Any, error: Exception) -> None:
    """It costs no answer: all drafts are verified from now on."""
    setattr(drafter, FAILED, True)
    vars(drafter).pop(NAME, None)
    logger.error("specdec: how likely drafts are is not known: %s", error, exc_info=error)


def taken_from(drafter: Any, draft_token_ids: list[list[int]]) -> list[list[float]] | None:
    """For each of a step's draft tokens the log of how likely it and all before it are; None where that is not known.

    What was left by ``with_confidence`` is taken away.
    """
    log_probs = vars(drafter).pop(NAME, None)
    count, width = len(draft_token_ids), len(draft_token_ids[0]) if draft_token_ids else 0
    if not log_probs or not width or any(len(draft) != width for draft in draft_token_ids):
        return None
    import torch

    if len({len(each) for each in log_probs}) > 1:
        return None
    rows = torch.stack(log_probs, dim=1).flatten()  # a parallel drafter samples all of a sequence in one call
    if len(rows) % count or len(rows) < count * width:
        return None
    found: list[list[float]] = rows.view(count, -1)[:, :width].cumsum(dim=1).tolist()
    return found
