"""On vLLM's newer runner the head rests at K = 0, and its cache gets what running it in every step would leave."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from serving.keys_only import LONG_REST
from serving.resting_speculator import with_rest
from tests.unit.test_keys_only import WIDTH, Model

NUM_REQUESTS = 2


class Speculator:
    """vLLM's in short: one row a sequence, at most three drafts each."""

    method, supports_mm_inputs, pcp_manager, dp_size, dcp_size = "eagle3", False, None, 1, 1
    draft_attn_layer_names = ("head.attention",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.draft_tokens, self.num_runs = Model(), torch.zeros(8, 3, dtype=torch.long), 0

    def propose(
        self, input_batch, attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled,
        num_rejected, last_sampled, next_prefill_tokens, num_speculative_tokens=None, dummy_run=False,
    ) -> torch.Tensor:  # fmt: skip
        self.num_runs += 1
        count, layers = input_batch.num_tokens, self.model.model
        layers.attention.slots = slot_mappings["head.attention"][:count]
        states = self.model.combine_hidden_states(torch.cat([part[:count] for part in aux_hidden_states], dim=-1))
        ids = last_sampled[input_batch.idx_mapping, 0] if count == NUM_REQUESTS else torch.arange(count)
        layers(ids, input_batch.positions[:count], states)
        return self.draft_tokens[: input_batch.num_reqs]


def step(
    propose, speculator: Speculator, position: int, width: int | None = 0, prompt: int = 0, **more
) -> torch.Tensor:
    """Two sequences read a token each at ``position``, or one ``prompt`` tokens; buffers are used again, and padded."""
    count = prompt or NUM_REQUESTS
    states, slots, positions, sampled = speculator.__dict__.setdefault(
        "buffers",
        (torch.zeros(3, 12, WIDTH), torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.long),
         torch.zeros(8, 1, dtype=torch.long)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(position)
    states.copy_(torch.randn(states.shape, generator=generator))
    slots[:count] = torch.arange(prompt) if prompt else torch.tensor([position, 32 + position])
    positions[:count] = torch.arange(prompt) if prompt else position
    sampled[:] = torch.arange(8)[:, None] + 10 * position
    batch = SimpleNamespace(
        num_reqs=1 if prompt else NUM_REQUESTS, num_tokens=count, num_draft_tokens=0, has_prefill=bool(prompt),
        positions=positions, idx_mapping=torch.tensor([5, 3]),
    )  # fmt: skip
    arguments = batch, {}, {"head.attention": slots}, states[-1], list(states), None, None, sampled, None
    return propose(speculator, *arguments, num_speculative_tokens=width, **more)


@torch.no_grad()
def test_the_cache_is_what_running_the_head_in_every_step_leaves():
    rests, runs = Speculator(), Speculator()
    propose = with_rest(Speculator.propose)
    for position in range(5):
        assert step(propose, rests, position).shape == (2, 3)
        step(Speculator.propose, runs, position)
    assert rests.num_runs == 0 and rests.model.model.attention.writes == []
    for speculator, each in ((rests, propose), (runs, Speculator.propose)):
        step(each, speculator, 5, width=3)
    assert rests.num_runs == 1 and len(rests.model.model.attention.writes) == 2
    torch.testing.assert_close(rests.model.model.attention.kv_cache, runs.model.model.attention.kv_cache)
    assert runs.model.model.attention.kv_cache.abs().sum() > 0


@torch.no_grad()
def test_a_prompt_is_read_at_once_after_what_waits():
    speculator, propose = Speculator(), with_rest(Speculator.propose)
    step(propose, speculator, 1)
    step(propose, speculator, 0, prompt=4)
    assert speculator.num_runs == 1 and speculator.model.model.attention.writes == [[1, 33], [0, 1, 2, 3]]
    step(propose, speculator, 7, dummy_run=True)
    step(propose, speculator, 7, width=None)
    assert speculator.num_runs == 3 and speculator.specdec_keys.num_waiting == 0


@torch.no_grad()
def test_after_a_long_rest_nothing_more_waits():
    speculator, propose = Speculator(), with_rest(Speculator.propose)
    for position in range(LONG_REST + 20):
        step(propose, speculator, position % 32)
    assert speculator.specdec_keys.num_waiting == NUM_REQUESTS * LONG_REST and speculator.num_runs == 0


@torch.no_grad()
def test_every_request_counts_towards_a_long_rest(monkeypatch):
    monkeypatch.setattr("serving.keys_only.MANY_ANSWERED", 40)
    speculator, propose = Speculator(), with_rest(Speculator.propose)
    for position in range(30):
        step(propose, speculator, position)
    assert speculator.specdec_keys.num_waiting == 40


@torch.no_grad()
def test_a_failure_runs_the_head_from_then_on(caplog):
    speculator, propose = Speculator(), with_rest(Speculator.propose)
    step(propose, speculator, 1)
    speculator.draft_attn_layer_names = ()
    assert step(propose, speculator, 2).shape == (2, 3)
    assert "plain steps run the head as well" in caplog.text and speculator.num_runs == 1
    step(propose, speculator, 3)
    assert speculator.num_runs == 2


@pytest.mark.parametrize(
    "change", [{"method": "mtp"}, {"dp_size": 2}, {"pcp_manager": 1}, {"supports_mm_inputs": True}, {"model": None}]
)
@torch.no_grad()
def test_any_other_speculator_runs_as_it_is(change):
    speculator, propose = Speculator(), with_rest(Speculator.propose)
    step(propose, other := Speculator(), 1)
    assert other.num_runs == 0
    if change == {"model": None}:
        speculator.model.more = Model().model.attention  # a second layer that attends
        change = {}
    vars(speculator).update(change)
    step(propose, speculator, 1)
    assert speculator.num_runs == 1
