"""What was put off reaches the head in order, without gaps, in one query; nothing is put off that must not be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from serving.catch_up import LONGEST, CatchUp, with_catch_up

BLOCK = 4


@dataclass
class Metadata:
    """The fields of vLLM's CommonAttentionMetadata that matter here."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_actual_tokens: int
    max_query_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None
    _token_to_req_indices_cache: torch.Tensor | None = None

    def batch_size(self) -> int:
        return len(self.seq_lens)

    def replace(self, **changes):
        return replace(self, **changes)


class Drafter:
    """Keeps what it was asked to read."""

    method, block_size, max_num_tokens, draft_attn_groups = "eagle3", BLOCK, 256, ("group",)
    num_speculative_tokens, parallel_drafting, net_num_new_slots_per_request = 3, False, 0
    model = SimpleNamespace(modules=lambda: [SimpleNamespace(impl=None, kv_cache=None)] * 2)  # two layers that attend

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def propose(self, **inputs):
        self.calls.append(inputs)
        return torch.zeros(inputs["common_attn_metadata"].batch_size(), inputs["num_speculative_tokens"])


class World:
    """Sequences that grow token by token: token id = 100 * request + position."""

    def __init__(self, **positions: int) -> None:
        self.drafter, self.batch = Drafter(), SimpleNamespace(req_ids=list(positions))
        self.catch_up = CatchUp(self.drafter, self.batch)
        self.positions = dict(positions)

    def step(self, width: int, rejected: int = 0, lengths: dict[str, int] | None = None):
        names = self.batch.req_ids
        lengths = {name: (lengths or {}).get(name, 1) for name in names}
        places = [p for name in names for p in range(self.positions[name], self.positions[name] + lengths[name])]
        owners = [ord(name) for name in names for _ in range(lengths[name])]
        starts = torch.tensor([0, *torch.tensor([lengths[name] for name in names]).cumsum(0)], dtype=torch.int32)
        for name in names:
            self.positions[name] += lengths[name]
        position, owner = torch.tensor(places), torch.tensor(owners)
        num_rejected = torch.full((len(names),), rejected, dtype=torch.int32)
        metadata = Metadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([self.positions[name] for name in names]),
            num_actual_tokens=len(places),
            max_query_len=max(lengths.values()),
            block_table_tensor=torch.tensor([[ord(name) * 10 + i for i in range(64)] for name in names]),
            slot_mapping=position,
        )
        return self.catch_up(
            num_speculative_tokens=width,
            target_token_ids=100 * owner + position,
            target_positions=position,
            target_hidden_states=torch.stack([owner, position], -1).float(),
            next_token_ids=torch.tensor([100 * ord(name) + self.positions[name] for name in names]),
            token_indices_to_sample=starts[1:] - 1 - num_rejected,
            common_attn_metadata=metadata,
            sampling_metadata=None,
            num_rejected_tokens_gpu=num_rejected,
        )

    def read(self) -> list[list[int]]:
        """Positions of each request in the last call, tokens, states and slots checked on the way."""
        inputs = self.drafter.calls[-1]
        metadata, names = inputs["common_attn_metadata"], self.batch.req_ids
        starts = metadata.query_start_loc.tolist()
        assert starts == metadata.query_start_loc_cpu.tolist() and starts[-1] == metadata.num_actual_tokens
        assert inputs["token_indices_to_sample"].tolist() == [end - 1 for end in starts[1:]]
        found = []
        for row, name in enumerate(names):
            part = slice(starts[row], starts[row + 1])
            positions = inputs["target_positions"][part].tolist()
            assert inputs["target_token_ids"][part].tolist() == [100 * ord(name) + p for p in positions]
            assert inputs["target_hidden_states"][part].tolist() == [[ord(name), p] for p in positions]
            assert metadata.slot_mapping[part].tolist() == [
                (ord(name) * 10 + p // BLOCK) * BLOCK + p % BLOCK for p in positions
            ]
            found.append(positions)
        assert metadata.max_query_len == max(map(len, found))
        return found


def test_the_head_rests_while_nothing_is_drafted_and_reads_all_when_it_drafts_again():
    world = World(a=5, b=9)
    for _ in range(3):
        assert world.step(0).shape == (2, 0)
    assert world.drafter.calls == []
    assert world.step(3).shape == (2, 3)
    assert world.read() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    world.step(3, lengths={"a": 4, "b": 4}, rejected=1)
    assert len(world.drafter.calls) == 2 and world.catch_up.waiting == []


def test_requests_that_come_go_and_change_places():
    world = World(a=5, b=9)
    world.step(0)
    world.batch.req_ids = ["b", "c"]  # a has ended, c has come with a prompt of 4
    world.positions["c"] = 0
    world.step(0, lengths={"c": 4})  # a prompt is read at once, and what waited with it
    assert world.read() == [[9, 10], [0, 1, 2, 3]]
    world.step(0)
    world.batch.req_ids = ["c", "b"]
    world.step(2)
    assert world.read() == [[4, 5], [11, 12]]


def test_a_preempted_request_starts_again_without_what_it_left_behind():
    world = World(a=5, b=9)
    world.step(0)
    world.positions["a"] = 0
    world.step(2, lengths={"a": 6})
    assert world.read() == [[0, 1, 2, 3, 4, 5], [9, 10]]


def test_it_waits_no_longer_than_it_may_and_holds_no_more_than_fits():
    world = World(a=5)
    for _ in range(LONGEST + 1):
        world.step(0)
    assert world.read() == [list(range(5, 5 + LONGEST + 1))]
    world = World(a=5, b=5)
    world.catch_up.max_num_tokens = 8
    for _ in range(8):
        world.step(0)
    assert max(inputs["common_attn_metadata"].num_actual_tokens for inputs in world.drafter.calls) <= 8


@pytest.mark.parametrize(("new_slots", "prompt", "read"), [(0, 7, 8), (0, 8, 8), (2, 3, 4), (2, 4, 4)])
def test_a_prompt_that_fills_the_heads_buffers_is_read_alone(new_slots, prompt, read):
    world = World(a=5)
    world.catch_up.max_num_tokens, world.catch_up.new_slots = 8, new_slots
    world.step(0)
    world.batch.req_ids, world.positions["b"] = ["a", "b"], 0
    world.step(0, lengths={"a": 1, "b": prompt - 1})
    num_read = world.drafter.calls[-1]["common_attn_metadata"].num_actual_tokens
    assert num_read == read and num_read + 2 * new_slots <= 8 and world.catch_up.waiting == []


def test_a_parallel_drafter_always_drafts_its_full_width():
    world = World(a=5)
    world.catch_up.fixed_width = 3
    assert world.step(2).shape == (1, 2)
    assert world.step(0, lengths={"a": 3}).shape == (1, 0)
    assert [inputs["num_speculative_tokens"] for inputs in world.drafter.calls] == [3, 3]


def test_a_step_that_verified_drafts_is_not_put_off():
    world = World(a=5)
    world.step(0, lengths={"a": 4}, rejected=2)
    assert len(world.drafter.calls) == 1
    assert world.drafter.calls[0]["token_indices_to_sample"].tolist() == [1]


@pytest.mark.parametrize("what", ["_keep", "_merge"])
def test_a_failure_costs_no_draft_and_ends_the_putting_off(monkeypatch, what):
    world = World(a=5)
    world.step(0)

    def fail(*_):
        raise RuntimeError("another vLLM")

    monkeypatch.setattr(world.catch_up, what, fail)
    assert world.step(2).shape == (1, 2)
    if what == "_keep":
        assert world.step(0).shape == (1, 0)
    monkeypatch.undo()
    num_calls = len(world.drafter.calls)
    world.step(0)
    assert len(world.drafter.calls) == num_calls + 1
    assert world.drafter.calls[-1]["target_positions"].tolist() == [world.positions["a"] - 1]


def test_a_proposer_of_another_shape_is_left_alone():
    runner = SimpleNamespace(drafter=SimpleNamespace(method="eagle3", draft_attn_groups=["group"]))
    runner.input_batch = SimpleNamespace(req_ids=[])
    assert with_catch_up(lambda runner, width: width)(runner, 3) == 3


@pytest.mark.parametrize("method,wrapped", [("eagle3", True), ("eagle", True), ("mtp", False), ("medusa", False)])
def test_only_proposers_that_it_understands_are_wrapped(method, wrapped):
    runner = SimpleNamespace(drafter=Drafter(), input_batch=SimpleNamespace(req_ids=[]))
    runner.drafter.method = method
    propose = with_catch_up(lambda runner, width: width)
    assert propose(runner, 3) == propose(runner, 3) == 3
    assert isinstance(runner.drafter.propose, CatchUp) is wrapped
