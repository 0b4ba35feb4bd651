"""Plain decode at the price of plain decode: the forward of a head of several layers is put off.

(For a head of one layer there is a cheaper way: ``serving/keys_only.py``.) At K = 0 vLLM 0.32 still runs the head once
a step, because an EAGLE head that missed tokens has holes in its keys and values, and its acceptance collapses when
drafting resumes. Here the head's inputs of such steps (token, position, the target's hidden states) are kept, and the
head reads them in one forward, like a prompt: with the next step that drafts, or every ``LONGEST`` steps, whichever
comes first. Nothing is lost, and a forward over 32 tokens costs little more than one over a single token.

A failure in here costs no answer: it is logged, and from then on the head runs in every step, as vLLM has it.

The blocks of a request that ends in between may stay in the prefix cache without these tokens' keys: a later request
that shares them drafts a little worse there, and so does a request whose tokens waited until the step was too full for
them. Outputs never depend on the head.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from serving.keys_only import KeysOnly, needs_keys_only

logger = logging.getLogger("vllm.specdec")

LONGEST = 32  # steps, and so the most tokens a sequence can be behind


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the head would have read in one step of N sequences, one token each."""

    rows: dict[str, int]  # request id -> index
    token_ids: Any  # [N]
    positions: Any  # [N]
    hidden_states: Any  # [N, width]


class CatchUp:
    """Stands in front of an EAGLE proposer's ``propose``. One object a worker, called once a step."""

    def __init__(self, drafter: Any, input_batch: Any) -> None:
        self.propose, self.input_batch = drafter.propose, input_batch
        self.drafter, self.max_num_tokens = drafter, drafter.max_num_tokens  # what the head's buffers hold
        self.new_slots = drafter.net_num_new_slots_per_request  # that a parallel drafter adds to each sequence
        # A parallel drafter's buffers are laid out for its full width: it drafts all, the first ones stay.
        self.fixed_width = drafter.num_speculative_tokens if drafter.parallel_drafting else None
        self.waiting: list[Inputs] = []
        self.has_failed = False

    def __call__(
        self,
        num_speculative_tokens: int,
        target_token_ids: Any,
        target_positions: Any,
        target_hidden_states: Any,
        next_token_ids: Any,
        token_indices_to_sample: Any,
        common_attn_metadata: Any,
        **kwargs: Any,
    ) -> Any:
        """As the proposer's own; at K = 0 it may return its empty drafts without running the head."""
        metadata = common_attn_metadata
        inputs = target_token_ids, target_positions, target_hidden_states
        try:
            if num_speculative_tokens == 0 and self._keep(inputs, metadata):
                return next_token_ids.new_empty((metadata.batch_size(), 0))
            if self.waiting:
                waiting, self.waiting = self.waiting, []
                # Drafts are verified in the step after one that drafted, and that one left nothing waiting: so no token
                # of this step is rejected, and the last of each sequence is the one to draft after.
                same_requests = metadata.batch_size() == len(self.input_batch.req_ids)
                if same_requests and self._fits(waiting, len(inputs[0]), metadata):
                    inputs, metadata = self._merge(waiting, inputs, metadata)
                    token_indices_to_sample = metadata.query_start_loc[1:] - 1
        except Exception as error:
            self.has_failed, self.waiting = True, []
            logger.error("specdec: from now on plain steps run the head as well: %s", error, exc_info=error)
        drafts = self.propose(
            num_speculative_tokens=num_speculative_tokens if self.fixed_width is None else self.fixed_width,
            target_token_ids=inputs[0],
            target_positions=inputs[1],
            target_hidden_states=inputs[2],
            next_token_ids=next_token_ids,
            token_indices_to_sample=token_indices_to_sample,
            common_attn_metadata=metadata,
            **kwargs,
        )
        return drafts if self.fixed_width is None else drafts[:, :num_speculative_tokens]

    def _keep(self, inputs: tuple[Any, Any, Any], metadata: Any) -> bool:
        """Let these inputs wait, if they can: one token of each sequence, so none of them a draft."""
        only_decodes = metadata.max_query_len == 1 and len(inputs[0]) == metadata.batch_size()
        if self.has_failed or not only_decodes or not self._has_room(metadata):
            return False
        rows = {request_id: row for row, request_id in enumerate(self.input_batch.req_ids)}
        self.waiting.append(Inputs(rows, *(part.clone() for part in inputs)))
        return True

    def _has_room(self, metadata: Any) -> bool:
        return len(self.waiting) < LONGEST and self._fits(self.waiting, 2 * metadata.batch_size(), metadata)

    def _fits(self, waiting: list[Inputs], num_tokens: int, metadata: Any) -> bool:
        """Whether the head can read what waits with ``num_tokens`` more. A prompt may fill all of its buffers."""
        held = sum(len(inputs.rows) for inputs in waiting)
        return held + num_tokens + self.new_slots * metadata.batch_size() <= self.max_num_tokens

    def _merge(self, waiting: list[Inputs], now: tuple[Any, Any, Any], metadata: Any) -> tuple[Any, Any]:
        """Each sequence's waiting tokens in front of its present ones, and the metadata of these longer queries."""
        import torch

        token_ids, positions, hidden_states = (
            torch.cat([*(getattr(inputs, name) for inputs in waiting), part])
            for name, part in zip(("token_ids", "positions", "hidden_states"), now, strict=True)
        )
        starts = metadata.query_start_loc_cpu.tolist()
        queries = _queries([inputs.rows for inputs in waiting], self.input_batch.req_ids, starts, positions.tolist())
        lengths = [len(query) for query in queries]
        index = torch.tensor([place for query in queries for place in query], device=positions.device)
        rows = torch.repeat_interleave(
            torch.arange(len(lengths), device=index.device), torch.tensor(lengths, device=index.device)
        )
        positions = positions[index]
        size = self.drafter.block_size
        blocks = metadata.block_table_tensor[rows, positions // size].to(metadata.slot_mapping.dtype)
        query_start_loc_cpu = torch.tensor([0, *accumulate(lengths)], dtype=metadata.query_start_loc_cpu.dtype)
        longer = metadata.replace(
            query_start_loc=query_start_loc_cpu.to(metadata.query_start_loc),
            query_start_loc_cpu=query_start_loc_cpu,
            num_actual_tokens=len(index),
            max_query_len=max(lengths),
            slot_mapping=blocks * size + positions % size,
            positions=positions if metadata.positions is not None else None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return (token_ids[index], positions, hidden_states[index]), longer


def _queries(
    waiting: list[dict[str, int]], request_ids: list[str], starts: list[int], positions: list[int]
) -> list[list[int]]:
    """For each request the indices of its tokens, the oldest first, in the steps' inputs laid end to end.

    ``waiting``: the rows of each earlier step. ``starts``: where each request begins among the present tokens, and the
    end. ``positions``: of all tokens.
    """
    offsets = [0, *accumulate(len(rows) for rows in waiting)]
    present = offsets.pop()
    queries = []
    for row, request_id in enumerate(request_ids):
        query = deque(range(present + starts[row], present + starts[row + 1]))
        for rows, offset in zip(reversed(waiting), reversed(offsets), strict=True):
            # Without a gap: a preempted request starts again, and what it left behind is void.
            if request_id not in rows or positions[offset + rows[request_id]] + 1 != positions[query[0]]:
                break
            query.appendleft(offset + rows[request_id])
        queries.append(list(query))
    return queries


def with_catch_up(propose_draft_token_ids: Any) -> Any:
    """The runner's ``propose_draft_token_ids`` with a ``CatchUp`` in front of a proposer that it understands."""

    @functools.wraps(propose_draft_token_ids)
    def propose(runner: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = runner.drafter
        if not hasattr(drafter, "specdec_catch_up"):
            drafter.specdec_catch_up = _catch_up(drafter, runner.input_batch)
            if drafter.specdec_catch_up is not None:
                drafter.propose = drafter.specdec_catch_up
        drafts = None if kwargs else _kept(runner, drafter.specdec_catch_up, args)
        return propose_draft_token_ids(runner, *args, **kwargs) if drafts is None else drafts

    return propose


def _kept(runner: Any, catch_up: Any, args: tuple[Any, ...]) -> Any:
    """The empty drafts of a step at K = 0 that ``KeysOnly`` takes as it is; None: the runner has to prepare it."""
    if not isinstance(catch_up, KeysOnly):
        return None
    try:
        scheduled, sampled, _sampling, hidden_states, _sampled_states, aux_hidden_states, drafted, metadata, *_ = args
        if scheduled.num_spec_tokens_to_schedule or drafted is not None:
            return None
        # Tokens that are on the CPU already, or counted on the device, are prepared in other ways.
        if isinstance(sampled, list) or runner.valid_sampled_token_count_event is not None:
            return None
        features = aux_hidden_states if runner.use_aux_hidden_state_outputs else [hidden_states]
        drafts = catch_up.keep_plain_step(runner, metadata, sampled, features)
        if drafts is not None:
            runner._draft_probs = runner._draft_prob_req_ids = None
        return drafts
    except Exception as error:
        catch_up.fail(error)
        return None


def _catch_up(drafter: Any, input_batch: Any) -> CatchUp | KeysOnly | None:
    try:
        if not _is_understood(drafter):
            return None
        return KeysOnly(drafter) if needs_keys_only(drafter) else CatchUp(drafter, input_batch)
    except Exception as error:
        logger.error("specdec: plain steps run the head as well: %s", error, exc_info=error)
        return None


def _is_understood(drafter: Any) -> bool:
    """EAGLE-1 and EAGLE-3 of one group of keys and values, on text."""
    return (
        getattr(drafter, "method", None) in ("eagle", "eagle3")
        and not getattr(drafter, "uses_mrope", False)
        and not getattr(drafter, "supports_mm_inputs", False)
        and len(getattr(drafter, "draft_attn_groups", ())) == 1
    )
