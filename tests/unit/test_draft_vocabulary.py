"""Which tokens a head may draft, and how many."""

from __future__ import annotations

from collections import Counter

import pytest

from draft_training.draft_vocabulary import choose_draft_tokens, count_completion_tokens, covered_share
from draft_training.heads import load_head, resolve_draft_vocab
from specdec.traces import TokenRow

COUNTS = Counter({7: 50, 5: 30, 8: 15, 2: 4, 9: 1})


def row(prompt: list[int], completion: list[int]) -> TokenRow:
    start, end = len(prompt), len(prompt) + len(completion)
    spans = {"prompt_span": (0, start), "think_span": (start, start), "answer_span": (start, end)}
    return TokenRow(conversation_id="a", prompt="a", input_ids=[*prompt, *completion], **spans)


def test_only_completions_count():
    assert count_completion_tokens([row([9, 9, 9], [7, 5]), row([9], [7])]) == Counter({7: 2, 5: 1})


def test_draft_tokens_are_the_frequent_ones_then_the_lowest():
    assert choose_draft_tokens(Counter({7: 2, 5: 2, 8: 1}), vocab_size=10, draft_vocab_size=2) == [5, 7]
    assert choose_draft_tokens(Counter({7: 1}), vocab_size=10, draft_vocab_size=4) == [0, 1, 2, 7]
    assert choose_draft_tokens(Counter({7: 1}), vocab_size=3 + 5, draft_vocab_size=99) == list(range(8))


@pytest.mark.parametrize(
    ("coverage", "tokens"),
    [(0.5, [7]), (0.51, [5, 7]), (0.95, [5, 7, 8]), (0.99, [2, 5, 7, 8]), (1.0, [2, 5, 7, 8, 9])],
)
def test_coverage_takes_the_fewest_tokens_that_reach_it(coverage, tokens):
    size = resolve_draft_vocab(2, coverage, 10, COUNTS)
    chosen = choose_draft_tokens(COUNTS, 10, size)
    assert chosen == tokens
    assert covered_share(COUNTS, chosen) >= coverage


def test_without_a_coverage_the_size_counts_and_the_vocabulary_bounds_it():
    assert resolve_draft_vocab(2, None, 10, COUNTS) == 2
    assert resolve_draft_vocab(99, None, 10, COUNTS) == 10


def test_rows_without_completions_still_give_a_vocabulary():
    assert choose_draft_tokens(Counter(), 10, resolve_draft_vocab(2, 0.99, 10, Counter())) == [0]
    assert covered_share(Counter(), [0]) is None


@pytest.mark.parametrize("head", ["eagle3", "medusa", "peagle"])
def test_every_head_that_truncates_knows_coverage(head):
    spec = load_head(head)
    assert spec.draft_vocab_size(spec.options_cls(draft_vocab_coverage=0.8), 10, COUNTS) == 2
