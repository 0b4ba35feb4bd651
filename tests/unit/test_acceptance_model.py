"""What the policy knows of acceptance."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.acceptance import AcceptanceModel, expected_length


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=200))
def test_rates_stay_rates(drafts):
    model = AcceptanceModel([0.5] * 3, window=50.0, prior_weight=8.0)
    for drafted, accepted in drafts:
        model.observe(drafted, min(drafted, accepted))
    assert all(0 <= rate <= 1 for rate in model.conditional_rates)
    lengths = [model.expected_tokens(k) for k in range(4)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] <= 4


class Text:
    """In stretches, each as easy as it happens to be: as real text, a wider draft finds its first token harder."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokens = self._tokens()
        self.ease = next(self.tokens)

    def _tokens(self) -> Iterator[float]:
        while True:
            ease = self.random.gauss(0, 1.1)
            yield from [ease] * (1 + int(self.random.expovariate(0.1)))

    def draft(self, width: int) -> int:
        """How many of the draft's tokens are accepted; the text goes on behind them."""
        accepted = 0
        while accepted < width and self.random.random() < 1 / (1 + math.exp(-BASE[accepted] - self.ease)):
            accepted += 1
            self.ease = next(self.tokens)
        self.ease = next(self.tokens)
        return accepted

    def served(self, model: AcceptanceModel, width: int, num_drafts: int) -> float:
        """Tokens a step, while ``model`` looks on."""
        drafts = [self.draft(width) for _ in range(num_drafts)]
        for accepted in drafts:
            model.observe(width, accepted)
        return 1 + sum(drafts) / num_drafts


BASE = (1.0, 1.0, 0.72)


def a_model(window: float = 20_000.0) -> AcceptanceModel:
    return AcceptanceModel([0.65, 0.7, 0.7], window, prior_weight=6.0)


def test_what_a_k_comes_to_is_known_from_drafts_of_another():
    truth = {width: Text(width).served(a_model(), width, 60_000) for width in (1, 2, 3)}
    wide = a_model()
    Text(4).served(wide, 3, 60_000)
    by_rates = [expected_length(wide.conditional_rates[:width]) for width in (1, 2)]
    assert by_rates[0] < 0.985 * truth[1] and by_rates[1] < 0.993 * truth[2], (
        "rates of another K are no use as they are"
    )
    for width in (1, 2, 3):
        assert wide.expected_tokens(width) == pytest.approx(truth[width], rel=0.007)
    Text(5).served(wide, 1, 60_000)  # what it knows of the other positions is of before
    assert expected_length(wide.conditional_rates) > 1.02 * truth[3]
    for width in (1, 2, 3):
        assert wide.expected_tokens(width) == pytest.approx(truth[width], rel=0.01)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_where_all_or_nothing_is_accepted_no_k_is_corrected(width):
    model = a_model(window=200.0)
    for _ in range(3_000):
        model.observe(width, width)
    assert model.expected_tokens(width) == pytest.approx(width + 1, rel=1e-3)
    for _ in range(3_000):
        model.observe(3, 0)
    assert [model.expected_tokens(k) for k in range(4)] == pytest.approx([1] * 4, abs=1e-3)
