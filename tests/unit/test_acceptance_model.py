"""What the policy knows of acceptance."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import acceptance
from serving.acceptance import AcceptanceModel, expected_length


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=200))
def test_rates_stay_rates(drafts):
    model = AcceptanceModel([0.5] * 3, window=50.0, prior_weight=8.0)
    for drafted, accepted in drafts:
        model.observe({(drafted, min(drafted, accepted)): 1})
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
            model.observe({(width, accepted): 1})
        return 1 + sum(drafts) / num_drafts


BASE = (1.0, 1.0, 0.72)


def a_model(window: float = 20_000.0) -> AcceptanceModel:
    return AcceptanceModel([0.65, 0.7, 0.7], window, prior_weight=6.0)


def test_what_a_k_comes_to_is_known_from_drafts_of_another(monkeypatch):
    monkeypatch.setattr(acceptance, "ODD", math.inf)  # else a hard passage at the end is all that counts
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
        model.observe({(width, width): 1})
    assert model.expected_tokens(width) == pytest.approx(width + 1, rel=1e-3)
    for _ in range(3_000):
        model.observe({(3, 0): 1})
    assert [model.expected_tokens(k) for k in range(4)] == pytest.approx([1] * 4, abs=1e-3)


def observed(model: AcceptanceModel, rates: tuple[float, ...], num_drafts: int, seed: int) -> AcceptanceModel:
    """After so many drafts of all tokens, eight in each step."""
    rng = random.Random(seed)
    for _ in range(num_drafts // 8):
        lengths = [next((i for i, rate in enumerate(rates) if rng.random() > rate), len(rates)) for _ in range(8)]
        model.observe(Counter((len(rates), length) for length in lengths))
    return model


@pytest.mark.parametrize("seed", range(8))
def test_a_change_of_the_text_is_known_after_some_sixty_drafts(seed):
    model = observed(a_model(1024.0), (0.65, 0.7, 0.7), 4000, seed)
    assert model.conditional_rates == pytest.approx([0.65, 0.7, 0.7], abs=0.08)
    observed(model, (0.2, 0.7, 0.7), 64, seed)
    assert model.conditional_rates[0] < 0.42
    assert model.conditional_rates[2] == pytest.approx(0.7, abs=0.08), "what is as it was is not forgotten"
    assert model.expected_tokens(3) == pytest.approx(expected_length(model.conditional_rates), abs=0.03)
    observed(model, (0.65, 0.7, 0.7), 64, seed)
    assert model.conditional_rates[0] > 0.42


def test_while_the_text_stays_as_it_is_rates_hardly_waver():
    finals = [observed(a_model(1024.0), (0.65, 0.7, 0.7), 4000, seed).expected_tokens(3) for seed in range(30)]
    assert statistics.pstdev(finals) < 0.035  # a memory of 128 drafts: 0.08
    assert statistics.mean(finals) == pytest.approx(expected_length((0.65, 0.7, 0.7)), rel=0.01)


def test_all_drafts_of_a_step_count_alike_in_whatever_order_they_come():
    kinds = {(3, 0): 100, (3, 1): 60, (3, 3): 96}
    one, other = a_model(128.0), a_model(128.0)
    for _ in range(50):
        one.observe(kinds)
        other.observe(dict(reversed(kinds.items())))
    assert one.conditional_rates == other.conditional_rates == pytest.approx([156 / 256, 96 / 156, 1.0], abs=1e-6)


def test_what_a_wider_k_gives_is_the_less_certain_the_seldomer_it_was_drafted():
    model = a_model(1024.0)
    for _ in range(200):
        model.observe({(1, 1): 5, (1, 0): 3})
    doubts = model.uncertainty(2, 1), model.uncertainty(3, 1)
    assert 0.03 < doubts[0] < doubts[1] and model.uncertainty(1, 2) == model.uncertainty(1, 1) == 0
    for _ in range(50):
        model.observe({(3, 3): 3, (3, 1): 2, (3, 0): 3})
    assert model.uncertainty(2, 1) < doubts[0] / 2
