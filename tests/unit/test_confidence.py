"""What the worker says of how likely its drafts are."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from serving.confidence import NAME, taken_from, with_confidence

torch = pytest.importorskip("torch")

LOGITS = {1: [2.0, 0.0, 0.0], 2: [0.0, 0.0, 5.0]}  # by hidden state, over a draft vocabulary of three
OFFSETS = [10, 20, 30]  # from a draft token to the target's


def drafter(**changes) -> SimpleNamespace:
    model = SimpleNamespace(
        draft_id_to_target_id=torch.tensor(OFFSETS), lm_head=SimpleNamespace(tp_size=1),
        logits_processor=lambda head, states: torch.tensor([LOGITS[int(each)] for each in states]),
    )  # fmt: skip
    return SimpleNamespace(**{"model": model, "use_local_argmax_reduction": True, **changes})


def log_prob(state: int) -> float:
    return max(LOGITS[state]) - math.log(sum(map(math.exp, LOGITS[state])))


def test_the_likeliest_tokens_and_how_likely_all_before_each_are():
    each = drafter()
    sample = with_confidence(lambda *_: pytest.fail("not asked"))
    drafts = torch.stack([sample(each, torch.tensor(states)) for states in ([1, 2], [2, 2])], dim=1).tolist()
    assert drafts == [[10, 32], [32, 32]]
    found = taken_from(each, drafts)
    assert found[0] == pytest.approx([log_prob(1), log_prob(1) + log_prob(2)], abs=1e-5)
    assert found[1] == pytest.approx([log_prob(2), 2 * log_prob(2)], abs=1e-5)
    assert taken_from(each, drafts) is None, "taken once"


def test_a_parallel_drafter_says_it_of_all_positions_at_once():
    each = drafter()
    with_confidence(None)(each, torch.tensor([1, 2, 2, 1]))  # two sequences of two positions
    found = taken_from(each, [[10], [32]])
    assert [log for (log,) in found] == pytest.approx([log_prob(1), log_prob(2)], abs=1e-5)


def test_what_fits_no_draft_is_thrown_away():
    for drafts in ([], [[]], [[1], [2], [3]], [[1, 2], [3]]):
        each = drafter()
        with_confidence(None)(each, torch.tensor([1, 2]))
        assert taken_from(each, drafts) is None and not hasattr(each, NAME)


def test_a_head_without_a_vocabulary_of_its_own_drafts_as_before():
    whole = drafter()
    del whole.model.draft_id_to_target_id
    split = drafter()
    split.model.lm_head.tp_size = 2
    for each in (whole, split, drafter(use_local_argmax_reduction=False)):
        assert with_confidence(lambda *_: "vLLM's")(each, torch.tensor([1])) == "vLLM's"
        assert taken_from(each, [[1]]) is None


def test_a_failure_costs_no_draft_and_is_not_tried_again():
    each, asked = drafter(), []
    each.model.logits_processor = lambda *_: asked.append(1) or 1 / 0
    sample = with_confidence(lambda *_: "vLLM's")
    assert [sample(each, torch.tensor([1])) for _ in range(3)] == ["vLLM's"] * 3 and asked == [1]
    assert taken_from(each, [[1]]) is None
