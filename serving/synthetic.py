"""vLLM's synthetic acceptance on CPU: drafts are taken with given probabilities, whatever the target thinks of them.

It shows what speculation costs and could gain at any acceptance, without a head that reaches it. vLLM 0.32's two
rejection kernels do it on a GPU; their CPU stand-ins end the engine with an assertion. Everything else is left to them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def with_synthetic(kernel: Any, *, greedy: bool, instead: str) -> Any:
    """A rejection kernel's CPU stand-in that serves ``greedy`` or sampled requests.

    ``instead`` names its argument with the tokens that follow where a draft is refused.
    """
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def sample(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if not given.get("SYNTHETIC_MODE"):
            kernel(*args, **kwargs)
            return
        output, is_greedy = given["output_token_ids"], given["is_greedy"]
        take_by_rates(
            output,
            [True] * len(output) if is_greedy is None else (is_greedy == greedy).tolist(),
            given["cu_num_draft_tokens"],
            given["draft_token_ids"],
            given[instead],
            given["bonus_token_ids"].flatten(),
            given["uniform_probs"],
            given["synthetic_conditional_rates"],
        )

    return sample


def take_by_rates(
    output_token_ids: Any,  # [requests, K + 1], written in place
    are_served: list[bool],  # [requests]; the others' rows stay as they are
    cu_num_draft_tokens: Any,  # [requests], ends in what is [tokens]
    draft_token_ids: Any,  # [tokens]; -1 is padding, and refused
    instead: Any,  # [tokens], what follows where this draft is the first refused one
    bonus_token_ids: Any,  # [requests], what follows where none is
    uniform_probs: Any,  # [tokens]
    conditional_rates: Any,  # [K]
) -> None:
    """Take the drafts of each request up to the first whose number is not below the rate of its position."""
    first = 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        if are_served[request]:
            drafts = draft_token_ids[first:end]
            is_taken = (uniform_probs[first:end] < conditional_rates[: end - first]) & (drafts >= 0)
            num_taken = int(is_taken.cumprod(0).sum())
            output_token_ids[request, :num_taken] = drafts[:num_taken]
            all_taken = num_taken == end - first
            output_token_ids[request, num_taken] = bonus_token_ids[request] if all_taken else instead[first + num_taken]
        first = end
