"""Tells decoded random token ids, as load generators make them, from anything that people write.

Language and code repeat their words, keep to one or two scripts, and change case for a reason. Token soup does
none of it. Repetition is the strongest sign and holds in every language: among fifty words of prose or code about
one in five has been there before, among fifty random pieces hardly any.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from functools import lru_cache

MIN_WORDS = 16  # fewer say nothing
MAX_CHARS = 4000  # more say nothing new
# Scripts that one language mixes count as one.
FAMILIES = dict.fromkeys(("HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH", "IDEOGRAPHIC", "HANGUL"), "CJK")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be but by can for from had has have he how if in is it not of on or she so that the they
        this to was we what when which who with you your
        das der die du ein eine es ist mit nicht sie und von zu zum
        de et el en la las le les los que se un una""",
    )
)


def looks_like_random_tokens(text: str) -> bool:
    """Whether ``text`` reads like decoded random token ids. Errs on the side of no, and says no to short texts."""
    runs = _letter_runs(text[:MAX_CHARS])
    if len(runs) < MIN_WORDS:
        return False
    counts = Counter(script for script, _ in runs)
    num_scripts = sum(count >= max(2, 0.02 * len(runs)) for count in counts.values())
    switches = sum(left[0] != right[0] for left, right in itertools.pairwise(runs)) / (len(runs) - 1)
    pieces = [piece.casefold() for _, run in runs for piece in _split_case(run)]
    repeated = 1 - len(set(pieces)) / len(pieces)
    if num_scripts >= 3 and switches >= 0.3 and repeated < 0.15:
        return True
    latin = [run for script, run in runs if script == "LATIN"]
    if len(latin) < MIN_WORDS / 2 or repeated >= 0.06:
        return False
    stop_share = sum(word.casefold() in STOP_WORDS for word in latin) / len(latin)
    humps = len(re.findall(r"[^\W\d_A-Z][A-Z]", text[:MAX_CHARS])) / len(latin)
    starts = re.findall(r"(?<=[^\W\d_] )[^\W\d_]", text[:MAX_CHARS])  # words in mid-sentence
    capitals = sum(letter.isupper() for letter in starts) / max(1, len(starts))
    return stop_share < 0.08 and humps >= 0.02 and humps + capitals >= 0.2


@lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").replace("-", " ").split(" ")[0]
    return FAMILIES.get(name, name)


def _letter_runs(text: str) -> list[tuple[str, str]]:
    """(script, letters) of every unbroken run of letters of one script; combining marks stay with their letter."""
    runs: list[tuple[str, str]] = []
    open_run = False
    for character in text:
        if character.isalpha():
            script = _script(character)
            if open_run and runs[-1][0] == script:
                runs[-1] = (script, runs[-1][1] + character)
            else:
                runs.append((script, character))
            open_run = True
        elif open_run and unicodedata.category(character).startswith("M"):
            runs[-1] = (runs[-1][0], runs[-1][1] + character)
        else:
            open_run = False
    return runs


def _split_case(run: str) -> list[str]:
    """The words inside a camel-cased run."""
    return re.findall(r"[A-Z]?[^A-Z]+|[A-Z]+", run)
