"""While nothing is drafted, the head's cache gets the keys and values that running it in every step would leave."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from serving.catch_up import CatchUp, with_catch_up
from serving.keys_only import MANY, KeysOnly, newest_of_each

WIDTH, HEAD_SIZE, NUM_KV_HEADS, NUM_SLOTS = 12, 4, 2, 64


class Attention(nn.Module):
    """As much of vLLM's layer as is asked for; remembers which slots each write filled."""

    num_kv_heads, head_size, head_size_v = NUM_KV_HEADS, HEAD_SIZE, HEAD_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = torch.zeros(NUM_SLOTS, NUM_KV_HEADS, 2 * HEAD_SIZE)
        self.attn_backend = SimpleNamespace(forward_includes_kv_cache_update=False)
        self.impl = SimpleNamespace(do_kv_cache_update=self.update)
        self.writes: list[list[int]] = []
        self.slots = torch.empty(0)

    def update(self, layer: Attention, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots) -> None:
        assert layer is self and len(set(slots.tolist())) == len(slots), "the order of two writes is not defined"
        cache[slots] = torch.cat([key, value], dim=-1)
        self.writes.append(sorted(slots.tolist()))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shape = (-1, NUM_KV_HEADS, HEAD_SIZE)
        self.update(self, key.view(shape), value.view(shape), self.kv_cache, self.slots)
        return query


class Layers(nn.Module):
    """The head's decoder; says whether it was run beyond its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, WIDTH)
        self.qkv = nn.Linear(2 * WIDTH + 1, WIDTH + 2 * NUM_KV_HEADS * HEAD_SIZE)
        self.attention = Attention()
        self.num_whole_runs = 0

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([self.embed(input_ids), hidden_states, positions[:, None].float()], -1)
        size = NUM_KV_HEADS * HEAD_SIZE
        attended = self.attention(*self.qkv(inputs).split([WIDTH, size, size], dim=-1))
        self.num_whole_runs += 1
        return attended


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.fc = Layers(), nn.Linear(3 * WIDTH, WIDTH)

    def combine_hidden_states(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc(states)


class Drafter:
    """vLLM's proposer in short: shifts the tokens by one and runs the head on all of them."""

    method, parallel_drafting, draft_attn_groups = "eagle3", False, ("group",)
    num_speculative_tokens, max_num_tokens, net_num_new_slots_per_request = 3, 256, 0

    def __init__(self, num_layers: int = 1) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.more = [Attention() for _ in range(num_layers - 1)]
        self.model.more = nn.ModuleList(self.more)

    def propose(
        self, num_speculative_tokens, target_token_ids, target_positions, target_hidden_states, next_token_ids,
        token_indices_to_sample, common_attn_metadata,
    ) -> torch.Tensor:  # fmt: skip
        states, layers = self.model.combine_hidden_states(target_hidden_states), self.model.model
        last = token_indices_to_sample
        last = common_attn_metadata.query_start_loc[1:] - 1 if last is None else last
        ids = torch.cat([target_token_ids[1:], target_token_ids[:1]])
        ids[last] = next_token_ids
        layers.attention.slots = common_attn_metadata.slot_mapping[: len(ids)]
        layers(ids, target_positions, states)
        return torch.zeros(len(last), num_speculative_tokens, dtype=torch.long)


def step(propose: Callable, width: int, sequences: list[tuple[int, int, list[int], int]]) -> torch.Tensor:
    """``sequences``: block of slots, first position, token ids with the sampled one last, how many were rejected."""
    parts = [(block, list(range(first, first + len(ids) - 1)), ids) for block, first, ids, _ in sequences]
    ids = torch.tensor([token for _, _, tokens in parts for token in tokens[:-1]])
    positions = torch.tensor([position for _, places, _ in parts for position in places])
    slots = torch.tensor([16 * block + position for block, places, _ in parts for position in places])
    starts = torch.tensor([0, *torch.tensor([len(places) for _, places, _ in parts]).cumsum(0)])
    generator = torch.Generator().manual_seed(int(ids.sum()))
    rejected = torch.tensor([number for *_, number in sequences])
    return propose(
        num_speculative_tokens=width,
        target_token_ids=ids,
        target_positions=positions,
        target_hidden_states=torch.randn(len(ids), 3 * WIDTH, generator=generator),
        next_token_ids=torch.tensor([tokens[-1] for _, _, tokens in parts]),
        token_indices_to_sample=starts[1:] - 1 - rejected if rejected.any() else None,
        common_attn_metadata=SimpleNamespace(
            query_start_loc=starts,
            slot_mapping=torch.cat([slots, torch.full((3,), -1)]),  # padded, as for a CUDA graph
            batch_size=lambda: len(sequences),
        ),
    )


STEPS = [
    [(0, 0, [5, 6, 7, 8], 0), (1, 0, [9, 10], 0)],  # two prompts
    [(0, 3, [8, 11], 0), (1, 1, [10, 12], 0)],
    [(0, 4, [11, 13, 14, 15], 1), (2, 0, [20, 21, 22], 0)],  # drafts of which one was rejected, beside a new prompt
    [(0, 6, [15, 16], 0), (2, 2, [22, 23], 0)],  # over the rejected one's place
    [(1, 0, [30, 31, 32], 0)],  # the second request's block, given to another
]


@torch.no_grad()
def test_the_cache_is_what_running_the_head_in_every_step_leaves():
    rests, runs = Drafter(), Drafter()
    keys_only = KeysOnly(rests)
    for sequences in STEPS:
        assert step(keys_only, 0, sequences).shape == (len(sequences), 0)
        step(runs.propose, 0, sequences)
    layers = rests.model.model
    assert layers.attention.writes == [] and layers.num_whole_runs == 0
    drafts = step(keys_only, 3, [(1, 2, [32, 33], 0)])
    step(runs.propose, 3, [(1, 2, [32, 33], 0)])
    assert drafts.shape == (1, 3)
    assert len(layers.attention.writes) == 2 and layers.num_whole_runs == 1, "all that waited, then the step itself"
    torch.testing.assert_close(layers.attention.kv_cache, runs.model.model.attention.kv_cache)
    assert runs.model.model.attention.kv_cache.abs().sum() > 0


@torch.no_grad()
def test_what_waits_is_written_once_it_is_much():
    drafter = Drafter()
    keys_only = KeysOnly(drafter)
    prompt = [(0, 0, [*range(100, 116)], 0)]
    for _ in range(MANY // 15):
        step(keys_only, 0, prompt)
        assert drafter.model.model.attention.writes == []
    step(keys_only, 0, prompt)
    assert drafter.model.model.attention.writes == [list(range(15))]
    assert keys_only.waiting == []


@torch.no_grad()
def test_a_failure_runs_the_head_from_then_on(caplog):
    drafter = Drafter()
    keys_only = KeysOnly(drafter)
    step(keys_only, 0, STEPS[0])
    drafter.model.model.attention.impl.do_kv_cache_update = None
    assert step(keys_only, 3, STEPS[1]).shape == (2, 3)
    assert "plain steps run the head as well" in caplog.text
    assert step(keys_only, 0, STEPS[2]).shape == (2, 0)
    assert drafter.model.model.num_whole_runs == 2


def test_each_slot_keeps_its_newest_token():
    slots = torch.tensor([4, 2, 4, 9, 2])
    assert sorted(newest_of_each(slots).tolist()) == [2, 3, 4]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, KeysOnly),
        ({"num_layers": 2}, CatchUp),
        ({"parallel_drafting": True}, CatchUp),
        ({"included": True}, CatchUp),
        ({"method": "medusa"}, None),
    ],
)
def test_who_makes_keys_alone(change, kind):
    drafter = Drafter(change.pop("num_layers", 1))
    drafter.model.model.attention.attn_backend.forward_includes_kv_cache_update = change.pop("included", False)
    for name, value in change.items():
        setattr(drafter, name, value)
    seen = []
    runner = SimpleNamespace(drafter=drafter, input_batch=SimpleNamespace(req_ids=[]))
    with_catch_up(lambda runner: seen.append(runner.drafter.specdec_catch_up))(runner)
    assert [type(each) for each in seen] == [kind or type(None)]
    assert kind is None or drafter.propose is seen[0]
