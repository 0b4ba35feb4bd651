"""Which of the target's tokens a head may draft: the most frequent completion tokens of its rows. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from specdec.traces import TokenRow


def count_completion_tokens(rows: Iterable[TokenRow]) -> Counter[int]:
    """How often each token occurs in the completions."""
    return Counter(token for row in rows for token in row.input_ids[row.prompt_span[1] :])


def choose_draft_tokens(counts: Counter[int], vocab_size: int, draft_vocab_size: int) -> list[int]:
    """Ascending target ids: the most frequent ones.

    Room left over goes to the lowest ids: a BPE vocabulary is ordered by how often its merges occurred.
    """
    chosen = dict.fromkeys(token for token, _ in counts.most_common(draft_vocab_size))
    for token in range(vocab_size):
        if len(chosen) >= min(draft_vocab_size, vocab_size):
            break
        chosen.setdefault(token)
    return sorted(chosen)


def covered_share(counts: Counter[int], draft_token_ids: Iterable[int]) -> float | None:
    """Share of the counted tokens that can be drafted: what bounds acceptance. None without tokens."""
    return sum(counts[token] for token in draft_token_ids) / counts.total() if counts else None
