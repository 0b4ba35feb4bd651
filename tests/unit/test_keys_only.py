"""While nothing is drafted, the head's cache gets the keys and values that running it in every step would leave."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from serving.catch_up import CatchUp, with_catch_up
from serving.keys_only import LONG_REST, LONGEST_PROBE, MANY, MANY_ANSWERED, KeysOnly, newest_of_each

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
        self.sizes: list[int] = []

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(input_ids))
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


class Runner:
    """As much of vLLM's runner as prepares a step's proposal, and is asked to only where it must be."""

    valid_sampled_token_count_event, use_aux_hidden_state_outputs = None, True

    def __init__(self) -> None:
        self.drafter, self.num_prepared = Drafter(), 0
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])

    def propose_draft_token_ids(self, scheduled, sampled, _sampling, _hidden, _last, features, _drafted, metadata, _):
        self.num_prepared += 1
        return self.drafter.propose(
            num_speculative_tokens=scheduled.num_spec_tokens_to_schedule,
            target_token_ids=self.token_ids, target_positions=self.positions,
            target_hidden_states=torch.cat([part[:2] for part in features], dim=-1),
            next_token_ids=self.next_ids(sampled), token_indices_to_sample=None, common_attn_metadata=metadata,
        )  # fmt: skip

    def next_ids(self, sampled: torch.Tensor) -> torch.Tensor:
        """The prompt's next token where what was sampled is discarded."""
        return torch.where(torch.from_numpy(self.discard_request_mask.np), self.prompt_next, sampled[:, 0])

    def _get_positions(self, count: int) -> torch.Tensor:
        return self.positions[:count]

    def step(self, propose: Callable, first: int, is_discarded: bool = False, width: int = 0) -> torch.Tensor:
        """Two sequences read a token each at position ``first``."""
        generator = torch.Generator().manual_seed(first)
        self.token_ids, self.prompt_next = torch.tensor([first, 100 + first]), torch.tensor([7, 7])
        self.positions = torch.tensor([first, first])
        self.discard_request_mask = SimpleNamespace(np=torch.tensor([False, is_discarded]).numpy())
        metadata = SimpleNamespace(
            query_start_loc=torch.tensor([0, 1, 2]), slot_mapping=torch.tensor([first, 16 + first, -1]),
            batch_size=lambda: 2, num_actual_tokens=2, max_query_len=1,
        )  # fmt: skip
        features = [torch.randn(3, WIDTH, generator=generator) for _ in range(3)]  # padded by one
        scheduled = SimpleNamespace(num_spec_tokens_to_schedule=width)
        sampled = torch.tensor([[first + 1], [101 + first]])
        return propose(self, scheduled, sampled, None, None, None, features, None, metadata, None)


@torch.no_grad()
def test_a_plain_step_is_kept_without_the_runners_preparation():
    rests, runs = Runner(), Runner()
    propose = with_catch_up(Runner.propose_draft_token_ids)
    for first, is_discarded in enumerate([False, False, True, False]):
        assert rests.step(propose, first, is_discarded).shape == (2, 0)
        runs.step(Runner.propose_draft_token_ids, first, is_discarded)
    assert rests.num_prepared == 1, "the step of which a token is discarded"
    rests.drafter.specdec_catch_up.write()
    layers = rests.drafter.model.model
    assert layers.num_whole_runs == 0 and len(layers.attention.writes) == 1
    torch.testing.assert_close(layers.attention.kv_cache, runs.drafter.model.model.attention.kv_cache)


@torch.no_grad()
def test_after_a_long_rest_only_prompts_are_kept_until_drafting_lasts():
    runner, kept = Runner(), []
    propose = with_catch_up(Runner.propose_draft_token_ids)

    def num_kept(steps: int, width: int = 0) -> int:
        """Tokens of so many steps of two sequences."""
        kept.clear()
        for _ in range(steps):
            assert runner.step(propose, 0, width=width).shape == (2, width)
        return sum(kept)

    num_kept(1)
    keys_only = runner.drafter.specdec_catch_up
    keys_only.keep = lambda *inputs: kept.append(len(inputs[0]))
    assert num_kept(LONG_REST - 1) == 2 * (LONG_REST - 1)
    assert num_kept(20) == 0
    step(keys_only, 0, STEPS[0])
    assert kept == [4], "both prompts"
    num_kept(LONGEST_PROBE, width=3)
    assert num_kept(20) == 0, "a probe is no end of the rest"
    num_kept(LONGEST_PROBE + 1, width=3)
    assert num_kept(20) == 40


@torch.no_grad()
@pytest.mark.parametrize(("batch", "steps"), [(1, LONG_REST), (8, LONG_REST), (32, MANY_ANSWERED // 32)])
def test_a_large_batch_rests_sooner(batch, steps):
    keys_only, kept = KeysOnly(Drafter()), []
    keys_only.keep = lambda *inputs: kept.append(len(inputs[0]))
    sampled, metadata = torch.zeros(batch, 1), SimpleNamespace(num_actual_tokens=batch, max_query_len=1)
    metadata.slot_mapping = torch.arange(batch)
    discarded = SimpleNamespace(np=torch.zeros(batch, dtype=torch.bool).numpy())
    runner = SimpleNamespace(discard_request_mask=discarded, _get_positions=torch.arange)
    for _ in range(steps + 20):
        drafts = keys_only.keep_plain_step(runner, metadata, sampled, [torch.zeros(batch, WIDTH)])
        assert drafts.shape == (batch, 0)
    assert kept == [batch] * steps


@torch.no_grad()
def test_a_runner_of_another_kind_prepares_every_step(caplog):
    runner = Runner()
    propose = with_catch_up(Runner.propose_draft_token_ids)
    runner.step(propose, 0)
    runner._get_positions = None
    assert runner.step(propose, 1).shape == (2, 0)
    assert "plain steps run the head as well" in caplog.text and runner.drafter.model.model.num_whole_runs == 1


@torch.no_grad()
def test_what_waits_is_written_once_it_is_much():
    drafter = Drafter()
    keys_only = KeysOnly(drafter)
    layers = drafter.model.model
    prompt = [(0, 0, [*range(100, 116)], 0)]
    for _ in range(MANY // 15):
        step(keys_only, 0, prompt)
        assert layers.attention.writes == []
    step(keys_only, 0, prompt)
    assert layers.attention.writes == [list(range(15))]
    left = 15 * (MANY // 15 + 1) - MANY
    assert keys_only.num_waiting == left == sum(len(slots) for *_, slots in keys_only.waiting)
    step(keys_only, 1, [(1, 0, [5, 6], 0)])
    assert len(layers.attention.writes[1]) == left and keys_only.waiting == []


@torch.no_grad()
def test_writes_come_in_few_sizes():
    rests, runs = Drafter(), Drafter()
    keys_only = KeysOnly(rests)
    for count in range(1, 40):
        tokens = [(0, 0, [*range(count + 1)], 0)]
        step(keys_only, 0, tokens)
        step(runs.propose, 0, tokens)
        keys_only.write()
        assert len(rests.model.model.attention.writes[-1]) == count
    assert set(rests.model.model.sizes) == {16, 32, 64}
    torch.testing.assert_close(rests.model.model.attention.kv_cache, runs.model.model.attention.kv_cache)


@torch.no_grad()
def test_a_long_prompt_is_written_in_parts_and_a_later_token_of_a_slot_stays():
    count = MANY + 2
    inputs = torch.arange(count), torch.arange(count), torch.randn(count, 3 * WIDTH), torch.arange(count) % NUM_SLOTS
    inputs[-1][-1] = 0  # as the first one's
    whole, last = KeysOnly(Drafter()), KeysOnly(Drafter())
    whole.keep(*inputs)
    whole.write()
    last.keep(*(part[-1:] for part in inputs))
    last.write()
    attention = whole.drafter.model.model.attention
    assert len(attention.writes) == 2 and 0 in attention.writes[0]
    torch.testing.assert_close(attention.kv_cache[0], last.drafter.model.model.attention.kv_cache[0])


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
