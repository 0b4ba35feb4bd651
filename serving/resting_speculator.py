"""Plain decode without the head's forward on vLLM's newer runner, whose drafter is called a speculator.

As ``serving/keys_only.py`` does on the older one: at K = 0, in a step of one token a sequence, the head is not run, and
what it would have read waits until it drafts again, or reads a prompt. Launching that forward takes the CPU as long as
a GPU takes for a good part of a small target's step.

A failure in here costs no answer: it is logged, and from then on the head runs in every step, as vLLM has it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from serving.keys_only import KeysOnly, has_keys_of_its_own

logger = logging.getLogger("vllm.specdec")

MANY = 4096  # tokens: each write reads a size back from the GPU, which is to be rare; 21 KB each of a target of 7B


def with_rest(propose: Any) -> Any:
    """The speculator's ``propose``, which at K = 0 leaves a step of single tokens to a ``KeysOnly``."""

    @functools.wraps(propose)
    def rest_or_propose(
        speculator: Any,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        last_sampled: Any,
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        keys = None if dummy_run else _keys_of(speculator)
        if keys is not None and num_speculative_tokens is not None and not keys.has_failed:
            try:
                keys.count(num_speculative_tokens, input_batch.num_reqs)
                if num_speculative_tokens == 0 and _is_plain(input_batch):
                    if not keys.is_long_rest:
                        features = aux_hidden_states or [last_hidden_states]
                        keys.keep(*_inputs(speculator, input_batch, slot_mappings, features, last_sampled))
                    return speculator.draft_tokens[: input_batch.num_reqs]  # the runner voids them
                keys.write()
            except Exception as error:
                keys.fail(error)
        return propose(
            speculator, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
            num_rejected, last_sampled, *args, num_speculative_tokens=num_speculative_tokens, dummy_run=dummy_run,
            **kwargs,
        )  # fmt: skip

    return rest_or_propose


def _is_plain(batch: Any) -> bool:
    """Whether each sequence reads the one token that it sampled last."""
    return not batch.has_prefill and batch.num_tokens == batch.num_reqs and not batch.num_draft_tokens


def _inputs(speculator: Any, batch: Any, slot_mappings: Any, features: list[Any], last_sampled: Any) -> tuple[Any, ...]:
    """Copies of what the head would read, one row a sequence: the runner's own tensors are used again."""
    import torch

    count = batch.num_reqs
    ids = last_sampled.view(-1)[batch.idx_mapping[:count]]  # just sampled
    slots = slot_mappings[next(iter(speculator.draft_attn_layer_names))]
    hidden_states = torch.cat([part[:count] for part in features], dim=-1)
    return ids, batch.positions[:count].clone(), hidden_states, slots[:count].clone()


def _keys_of(speculator: Any) -> KeysOnly | None:
    """One for each speculator that this is done for."""
    if not hasattr(speculator, "specdec_keys"):
        speculator.specdec_keys = None
        try:
            if _is_understood(speculator):
                speculator.specdec_keys = KeysOnly(speculator, MANY)
        except Exception as error:
            logger.error("specdec: plain steps run the head as well: %s", error, exc_info=error)
    keys: KeysOnly | None = speculator.specdec_keys
    return keys


def _is_understood(speculator: Any) -> bool:
    """EAGLE-1 and EAGLE-3 on text, on ranks that need not keep step with each other."""
    return (
        speculator.method in ("eagle", "eagle3")
        and not speculator.supports_mm_inputs
        and speculator.pcp_manager is None
        and speculator.dp_size == speculator.dcp_size == 1
        and has_keys_of_its_own(speculator)
    )
