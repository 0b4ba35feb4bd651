"""Top-p without the sort keeps vLLM's own set, row by row: at random, at ties, at cuts that rounding decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.nucleus import NUM_CANDIDATES, nucleus_edge, without_sort

VOCAB = 4096


def by_sorting(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor, **_) -> torch.Tensor:
    """What vLLM 0.32 does on CPU, in its words; ``test_vllm_plugin.py`` holds it to the real one."""
    assert k is None
    logits_sort, logits_idx = logits.sort(dim=-1, descending=False)
    probs_sort = logits_sort.softmax(dim=-1)
    top_p_mask = torch.cumsum(probs_sort, dim=-1) <= 1 - p.unsqueeze(dim=1)
    top_p_mask[:, -1] = False
    return logits.scatter_(-1, logits_idx, logits_sort.masked_fill(top_p_mask, -float("inf")))


class Sorting:
    """``by_sorting``, and how many rows came to it."""

    num_rows = 0

    def __call__(self, logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor, **kwargs) -> torch.Tensor:
        self.num_rows += len(logits)
        return by_sorting(logits, k, p)


def kept_alike(logits: torch.Tensor, p: torch.Tensor) -> int:
    """Compare both; returns the rows that were sorted."""
    sorting = Sorting()
    expected = by_sorting(logits.clone(), None, p)
    own = logits.clone()
    returned = without_sort(sorting)(own, None, p)
    assert torch.equal(returned, own), "in place, as vLLM's"
    assert torch.equal(returned, expected)
    return sorting.num_rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(0.5, 30),
    levels=st.sampled_from([0, 1, 3, 40]),
    p=st.floats(0.01, 1),
)
def test_the_kept_set_is_vllm_s(seed: int, scale: float, levels: int, p: float):
    """``levels`` per unit of logit: few make ties everywhere, the cut's included."""
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    if levels:
        logits = (logits * levels).round() / levels
    kept_alike(logits, torch.tensor([p, 0.95, 0.9, 0.5, 1.0, 0.999]))


def peaked(probabilities: list[float]) -> torch.Tensor:
    """A row whose largest tokens have these probabilities; the rest of the mass is spread evenly."""
    rest = (1 - math.fsum(probabilities)) / (VOCAB - len(probabilities))
    row = torch.full((VOCAB,), rest, dtype=torch.float64)
    row[:: VOCAB // len(probabilities)][: len(probabilities)] = torch.tensor(probabilities, dtype=torch.float64)
    return row.log().float().unsqueeze(0)


def banned_but(num_tokens: int) -> torch.Tensor:
    """A row in which only these many equal tokens may be sampled."""
    return torch.full((1, VOCAB), -float("inf")).index_fill_(1, torch.arange(num_tokens), 1.0)


def test_peaked_rows_are_not_sorted():
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)) * 5
    assert kept_alike(logits, torch.full((64,), 0.9)) <= 3


@pytest.mark.parametrize(
    ("row", "p"),
    [
        (peaked([0.5, 0.25, 0.2]), 0.75),  # two tokens reach p exactly: rounding decides on the third
        (peaked([0.3, 0.3, 0.3]), 0.5),  # the cut falls between equals
        (peaked([0.4, 0.3]), 0.95),  # and between the many equals of the tail
        (torch.zeros(1, VOCAB), 0.95),
        (banned_but(2), 0.4),
        (peaked([0.9]).index_fill_(1, torch.tensor([3]), float("nan")), 0.5),
    ],
)
def test_a_row_that_the_candidates_do_not_settle_is_sorted(row: torch.Tensor, p: float):
    _, settled = nucleus_edge(row, torch.tensor([p]))
    assert settled.tolist() == [False]
    if not row.isnan().any():
        assert kept_alike(row, torch.tensor([p])) == 1


@pytest.mark.parametrize(
    ("row", "p", "num_kept"),
    [
        (peaked([0.5, 0.25, 0.2]), 0.7, 2),
        (peaked([0.98]), 0.95, 1),
        (banned_but(1), 0.9, 1),
        (banned_but(2), 0.9, 2),
        (peaked([0.95 / 200] * 200).add_(torch.linspace(0, 1e-3, VOCAB)), 0.9, None),  # a wide nucleus, nearly even
    ],
)
def test_a_row_that_they_settle_is_not(row: torch.Tensor, p: float, num_kept: int | None):
    assert kept_alike(row, torch.tensor([p])) == 0
    if num_kept is not None:
        assert by_sorting(row, None, torch.tensor([p])).isfinite().sum() == num_kept


def test_the_rounding_of_a_long_sum_is_allowed_for():
    """In 150,000 equal tails vLLM's float32 sum is off by more than its ulps; cuts around it come out as vLLM's."""
    logits = torch.zeros(1, 150_000)
    logits[0, :3] = torch.tensor([14.0, 13.5, 13.0])
    exact = logits.double().softmax(-1)[0, :2].cumsum(0)
    for mass in exact.tolist():
        steps = torch.arange(-10, 10) * 2.0**-22
        kept_alike(logits.expand(20, -1).clone(), (mass + steps).float())


def test_what_it_is_not_made_for_goes_to_vllm_whole():
    seen = []
    apply = without_sort(lambda *arguments, **kwargs: seen.append((arguments, kwargs)))
    p, k = torch.tensor([0.9]), torch.tensor([5])
    cases = [
        (torch.zeros(1, VOCAB), k, p),
        (torch.zeros(1, VOCAB), k, None),
        (torch.zeros(1, NUM_CANDIDATES), None, p),
        (torch.zeros(1, VOCAB, dtype=torch.bfloat16), None, p),
    ]
    for case in cases:
        apply(*case, allow_cpu_sync=True)
    assert [arguments for arguments, _ in seen] == cases
    assert all(kwargs == {"allow_cpu_sync": True} for _, kwargs in seen)
