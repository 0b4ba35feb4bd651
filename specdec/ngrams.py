"""Texts as hashed word n-grams: what near-duplicates and overlaps with benchmarks are found by."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Chinese and Japanese are written without spaces: there a character counts as a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing modulo 2 ** 64


def words(text: str) -> list[str]:
    """Words and numbers without case, punctuation and typographic variants."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngram_hashes(tokens: list[str], n: int) -> np.ndarray:
    """64-bit hashes of the n-grams of ``tokens``, [max(1, len - n + 1)]; a shorter text is one n-gram.

    The hash of an n-gram is a polynomial in its words' own hashes, so every n-gram costs the same. Stable across
    processes; empty for no tokens.
    """
    import numpy as np

    hashes = np.array([_word_hash(token) for token in tokens], dtype=np.uint64)
    n = min(n, len(tokens))
    if not n:
        return hashes
    total = np.zeros(len(hashes) - n + 1, dtype=np.uint64)
    for i in range(n):
        total = total * np.uint64(_BASE) + hashes[i : len(hashes) - n + 1 + i]
    return total


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
