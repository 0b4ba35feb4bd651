"""Which rows ask what a benchmark asks: overlap of word 13-grams (as GPT-3's authors did, arXiv 2005.14165, app. C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from specdec.conventions import prompt_of
from specdec.evaluation.suites import load_suite, suite_names
from specdec.evaluation.suites.base import BOXED_DIRECTIVE
from specdec.ngrams import ngram_hashes, words
from specdec.rows import read_rows

NGRAM_WORDS = 13
BOILERPLATE_TEXTS, BOILERPLATE_SHARE = 5, 0.05


class Contamination:
    """The n-grams of benchmarks. ``sizes`` counts each one's texts."""

    def __init__(self, num_words: int = NGRAM_WORDS) -> None:
        self._num_words = num_words
        self._owners: dict[int, str] = {}
        self._whole: dict[int, str] = {}  # texts shorter than an n-gram match as a whole
        self.sizes: dict[str, int] = {}

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Index a benchmark. What many of its own texts share is an instruction, not a problem, and is left out."""
        counts: Counter[int] = Counter()
        num_texts = 0
        for text in texts:
            num_texts += 1
            tokens = _problem_words(text)
            hashes = set(ngram_hashes(tokens, self._num_words).tolist())
            if len(tokens) < self._num_words:
                self._whole |= dict.fromkeys(hashes, name)
            else:
                counts.update(hashes)
        most = max(BOILERPLATE_TEXTS, BOILERPLATE_SHARE * num_texts)
        self._owners |= {value: name for value, count in counts.items() if count <= most}
        self.sizes[name] = num_texts

    def find(self, text: str) -> str | None:
        """The benchmark that ``text`` overlaps with, or None."""
        tokens = _problem_words(text)
        known = self._owners if len(tokens) >= self._num_words else self._whole
        return next((known[value] for value in ngram_hashes(tokens, self._num_words).tolist() if value in known), None)


def _problem_words(text: str) -> list[str]:
    return words(text.replace(BOXED_DIRECTIVE, " "))


def load_contamination(benchmarks: list[str], num_words: int) -> Contamination:
    """Index suites by name, or any file, folder or hub data set of prompts.

    Raises:
        ValueError: one of them can't be read, or asks nothing.
    """
    contamination = Contamination(num_words)
    for benchmark in benchmarks:
        if benchmark.partition("=")[0] in suite_names():
            suite = load_suite(benchmark, None, 0)
            contamination.add(suite.name, (turn for item in suite.items for turn in item.turns))
        else:
            contamination.add(benchmark, _prompts(benchmark))
    return contamination


def _prompts(source: str) -> Iterable[str]:
    for where, row in read_rows(source, default_split="test"):
        prompt = prompt_of(row)
        if prompt is None:
            raise ValueError(f"{where}: no prompt to compare with; has {', '.join(sorted(row))}")
        yield prompt
