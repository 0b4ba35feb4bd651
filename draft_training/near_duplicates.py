"""Near-duplicates in one pass and bounded memory: MinHash signatures, banded (Broder 1997; Leskovec et al., ch. 3)."""

from __future__ import annotations

import re

import numpy as np

from specdec.ngrams import ngram_hashes, words

SHINGLE_WORDS = 3
NUM_BANDS, BAND_ROWS = 8, 4  # two texts that share 80 % of their shingles meet in a band with 98 % probability
MIN_SIMILARITY = 0.8  # estimated Jaccard similarity of the shingle sets
_SEEDS = np.random.default_rng(0).integers(1, 2**63, (2, NUM_BANDS * BAND_ROWS, 1), dtype=np.uint64)


def numbers_of(text: str) -> str:
    """The numbers of a text in order. One problem with other numbers is another problem, however alike the words."""
    return " ".join(re.findall(r"\d+", text))


class NearDuplicates:
    """Texts seen so far, about 1 kB each, and the groups of alike ones."""

    def __init__(self) -> None:
        self._signatures: list[np.ndarray] = []
        self._parents: list[int] = []  # a forest of groups; a root is its group's earliest text
        self._bands: dict[bytes, int] = {}  # the latest text with these values in this band

    def add(self, text: str, kind: str = "") -> int | None:
        """Remember ``text``; returns the number of an earlier text of the same ``kind`` that it repeats, or None."""
        signature = _signature(text)
        number = len(self._signatures)
        self._signatures.append(signature)
        self._parents.append(number)
        found = None
        for band in range(NUM_BANDS):
            part = signature[band * BAND_ROWS : (band + 1) * BAND_ROWS]
            key = f"{band} {kind} ".encode() + part.tobytes()
            other = self._bands.get(key)
            if other is not None and float(np.mean(self._signatures[other] == signature)) >= MIN_SIMILARITY:
                found = other if found is None else found
                self._parents[max(self.root(number), self.root(other))] = min(self.root(number), self.root(other))
            self._bands[key] = number
        return found

    def root(self, number: int) -> int:
        """The earliest text of the group that text ``number`` is in."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def _signature(text: str) -> np.ndarray:
    """[NUM_BANDS * BAND_ROWS] minima of as many hash functions over the text's shingles."""
    shingles = ngram_hashes(words(text), SHINGLE_WORDS)
    if not len(shingles):
        return np.zeros(NUM_BANDS * BAND_ROWS, dtype=np.uint64)
    factors, offsets = _SEEDS
    return ((shingles ^ (shingles >> np.uint64(31))) * (factors | np.uint64(1)) + offsets).min(axis=1)
