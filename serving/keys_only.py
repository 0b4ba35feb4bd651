"""Plain decode with a head of one layer: of all that it would have run, only its keys and values are made.

Such a head knows earlier tokens by their keys and values alone, and these need neither its attention nor its MLP nor
its output layer: under half of its arithmetic, and no attention metadata. At K = 0 the inputs of a step (prompts,
single tokens, drafts that were just verified) wait, and are written together once there are ``MANY`` tokens, or before
the head drafts again. So nothing is missing when drafting resumes, in the running requests or in the prefix cache.

The head's own code makes them: its forward runs uncompiled up to its attention, where the keys and values are taken.

A failure in here costs no answer: it is logged, and from then on the head runs in every step, as vLLM has it.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.specdec")

MANY = 256  # tokens of a write: enough that the call's own cost is small, few enough that no step waits long
FEWEST = 16  # rows of a write
LONG_REST = 512  # plain steps,
MANY_ANSWERED = 4096  # or tokens that were put out in them, whichever comes first; probes do not interrupt it:
LONGEST_PROBE = 16  # steps in a row that draft


class KeysOnly:
    """Stands in front of an EAGLE proposer's ``propose``. One object a worker, called once a step."""

    def __init__(self, drafter: Any, many: int = MANY) -> None:
        """``many``: tokens that wait at most, and of one write."""
        self.drafter, self.propose, self.many = drafter, drafter.propose, many
        self.attention = attention_layers(drafter)[0]
        self.waiting: list[tuple[Any, ...]] = []  # ids [N], positions [N], hidden states [N, width], slots [N]
        self.num_waiting = 0  # tokens
        self.num_plain = self.num_drafting = 0  # steps: since drafting ended, and since the last plain one
        self.num_answered = 0  # tokens that were put out since drafting ended
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
        """As the proposer's own; at K = 0 its empty drafts without running the head."""
        try:
            if not self.has_failed:
                self.count(num_speculative_tokens, len(next_token_ids))
                if num_speculative_tokens == 0:
                    last = token_indices_to_sample
                    last = common_attn_metadata.query_start_loc[1:] - 1 if last is None else last
                    ids = _shifted(target_token_ids, last, next_token_ids)
                    slots = common_attn_metadata.slot_mapping[: len(ids)]
                    self.keep(ids, target_positions.clone(), target_hidden_states.clone(), slots.clone())
                    return next_token_ids.new_empty((common_attn_metadata.batch_size(), 0))
                self.write()
        except Exception as error:
            self.fail(error)
        return self.propose(
            num_speculative_tokens=num_speculative_tokens,
            target_token_ids=target_token_ids,
            target_positions=target_positions,
            target_hidden_states=target_hidden_states,
            next_token_ids=next_token_ids,
            token_indices_to_sample=token_indices_to_sample,
            common_attn_metadata=common_attn_metadata,
            **kwargs,
        )

    def keep_plain_step(self, runner: Any, step: Any, sampled_token_ids: Any, hidden_states: list[Any]) -> Any:
        """As the runner would prepare and call the proposer at K = 0, for a step of one token a sequence; else None.

        What the head reads at each position is then the token that was just sampled, and nothing has to be looked up.
        ``hidden_states``: the target's, of as many layers as the head reads. ``step``: vLLM's attention metadata.
        """
        import torch

        count = step.num_actual_tokens
        is_plain = step.max_query_len == 1 and tuple(sampled_token_ids.shape) == (count, 1)
        if self.has_failed or not is_plain or runner.discard_request_mask.np[:count].any():
            return None
        self.count(0, count)
        ids = sampled_token_ids[:, 0].int()
        if self.is_long_rest:
            return ids.new_empty((count, 0))
        features = torch.cat([part[:count] for part in hidden_states], dim=-1)  # a copy, also of a single one
        self.keep(ids, runner._get_positions(count).clone(), features, step.slot_mapping[:count].clone())
        return ids.new_empty((count, 0))

    @property
    def is_long_rest(self) -> bool:
        """Whether answers are not worth keeping any more: the more at once, the more they cost."""
        return self.num_plain > LONG_REST or self.num_answered > MANY_ANSWERED

    def count(self, num_speculative_tokens: int, batch: int) -> None:
        """Once a step: whether it drafts, and for how many sequences."""
        if num_speculative_tokens == 0:
            self.num_plain, self.num_drafting = self.num_plain + 1, 0
            self.num_answered += batch
            return
        self.num_drafting += 1
        if self.num_drafting > LONGEST_PROBE:
            self.num_plain = self.num_answered = 0

    def fail(self, error: Exception) -> None:
        """Run the head in every step from now on."""
        self.has_failed, self.waiting, self.num_waiting = True, [], 0
        logger.error("specdec: from now on plain steps run the head as well: %s", error, exc_info=error)

    def keep(self, *inputs: Any) -> None:
        """Let a step's tokens wait: ids [N], positions [N], the target's hidden states [N, width], slots [N]."""
        self.waiting.append(inputs)
        self.num_waiting += len(inputs[0])
        if self.num_waiting >= self.many:
            self.write(self.num_waiting // self.many * self.many)

    def write(self, count: int | None = None) -> None:
        """Keys and values of the first ``count`` tokens that wait (None: of all) into the head's cache."""
        import torch

        if not self.num_waiting:
            return
        inputs = [torch.cat(parts) for parts in zip(*self.waiting, strict=True)]
        count = len(inputs[0]) if count is None else count
        left = tuple(part[count:].clone() for part in inputs)
        self.waiting, self.num_waiting = [left] if len(left[0]) else [], len(left[0])
        for rows in zip(*(part[:count].split(self.many) for part in inputs), strict=True):
            self._write_rows(*rows)  # in their order: a later token of the same slot stays

    def _write_rows(self, ids: Any, positions: Any, hidden_states: Any, slots: Any) -> None:
        """At most ``many`` tokens, made up to a power of two: on a CPU a matrix product of a number of rows that was
        not seen before is compiled first, which takes several times as long as the product."""
        newest = newest_of_each(slots)
        slots = slots[newest]
        size = max(FEWEST, 1 << (len(slots) - 1).bit_length())
        rows = newest.new_zeros(size)
        rows[: len(slots)] = newest
        model = self.drafter.model
        model = model.unwrap() if hasattr(model, "unwrap") else model
        hidden_states = hidden_states[rows]
        if self.drafter.method == "eagle3":
            hidden_states = model.combine_hidden_states(hidden_states)
        hook = self.attention.register_forward_pre_hook(_taking(slots))
        try:
            model.model.forward(input_ids=ids[rows], positions=positions[rows], hidden_states=hidden_states)
        except _Written:
            return
        finally:
            hook.remove()
        raise RuntimeError("the head's forward did not come to its attention")


def _shifted(token_ids: Any, last: Any, next_token_ids: Any) -> Any:
    """What the head reads at each position: the token after it, at each sequence's ``last`` the one just sampled."""
    ids = token_ids.roll(-1)
    ids[last] = next_token_ids.to(ids.dtype)
    return ids


class _Written(Exception):  # noqa: N818 - no error
    """The keys and values are in the cache; what the head would do next is of no use."""


def _taking(slots: Any) -> Any:
    """A hook of vLLM's attention layer that writes the first it is called with to ``slots``, and ends the forward."""

    def hook(attention: Any, inputs: tuple[Any, ...]) -> None:
        _query, key, value, *_ = inputs
        key = key.view(-1, attention.num_kv_heads, attention.head_size)[: len(slots)]
        value = value.view(-1, attention.num_kv_heads, attention.head_size_v)[: len(slots)]
        attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)
        raise _Written

    return hook


def newest_of_each(slots: Any) -> Any:
    """Indices into ``slots`` [N], one of each slot: the last one. Rejected drafts and freed blocks come twice."""
    import torch

    unique, owner = torch.unique(slots, return_inverse=True)
    order = torch.arange(len(slots), device=slots.device)
    return torch.zeros_like(unique, dtype=order.dtype).scatter_reduce_(0, owner, order, "amax", include_self=False)


def attention_layers(drafter: Any) -> list[Any]:
    """vLLM's attention layers of the drafter's model."""
    return [module for module in drafter.model.modules() if hasattr(module, "impl") and hasattr(module, "kv_cache")]


def needs_keys_only(drafter: Any) -> bool:
    """Whether the head has one layer, drafts one token after another, and its keys can be written on their own."""
    return not drafter.parallel_drafting and has_keys_of_its_own(drafter)


def has_keys_of_its_own(drafter: Any) -> bool:
    """Whether the head has one layer whose keys can be written without running it."""
    layers = attention_layers(drafter)
    return (
        len(layers) == 1
        and not layers[0].attn_backend.forward_includes_kv_cache_update
        and hasattr(layers[0].impl, "do_kv_cache_update")
    )
