"""The views in which two sets of continuations of one prompt are compared (see ``distribution``).

Letters of shapes: R rows of labels (the observed one first, then the permuted ones), N continuations of both arms,
T positions. Labels are 1 for the baseline and -1 for the arm.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ENDED = -1  # stands for every position after the end of a continuation
EXTREME = "extreme"
COMMONNESS = "commonness"
SURPRISE = "surprise"
SIGNED = (COMMONNESS, SURPRISE)  # their prompts add up with a sign; the other views are differences squared

NUM_WORST = 3
NUM_WORST_TOKENS = 5
# A share that fewer continuations have can't be extreme, but its few possible values would blunt the others.
MIN_COUNT = 8
BACK_OFF = 2.0  # continuations that the general frequency of a token weighs, beside its frequency in a context


def prompt_views(tokens: np.ndarray, labels: np.ndarray, surprise: np.ndarray) -> dict[str, np.ndarray]:
    """How far apart the arms are in each view: [R] for ``tokens`` [N, T], ``labels`` [R, N], ``surprise`` [N]."""
    import numpy as np

    singles = [_codes(column) for column in tokens.T]
    pairs = [_codes(before * len(tokens) + now) for before, now in itertools.pairwise(singles)]
    prefixes = pairs[:1]
    for now in singles[2:]:
        prefixes.append(_codes(prefixes[-1] * len(tokens) + now))
    prefixes = prefixes[1:]  # the prefix of two tokens is the pair again
    values = {}
    for view, columns in (("token", singles), ("pair", pairs), ("prefix", prefixes)):
        kernel = sum((_kernel(codes) for codes in columns), np.zeros((len(tokens), len(tokens))))
        values[view] = np.einsum("rn,rn->r", labels @ kernel, labels)
    values[EXTREME] = _extreme([*singles, *pairs, *prefixes], labels)
    for view, scores in ((COMMONNESS, _commonness(singles, pairs)), (SURPRISE, surprise)):
        values[view] = labels @ (scores - scores.mean())
    return values


def position_differences(prompt: str, tokens: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """For each position of ``tokens`` [N, T]: how much the arms of ``labels`` [N] differ, and in which tokens."""
    import numpy as np

    rows = []
    for position, column in enumerate(tokens.T):
        values, codes = np.unique(column, return_inverse=True)
        kernel = _kernel(codes)
        variance = np.sum(kernel**2) - np.sum(np.diag(kernel) ** 2)
        excess = labels @ kernel @ labels - np.trace(kernel)
        arms = [np.bincount(codes[labels == sign], minlength=len(values)) / np.sum(labels == sign) for sign in (1, -1)]
        order = np.argsort(-np.abs(arms[0] - arms[1]), kind="stable")[:NUM_WORST_TOKENS]
        shares = [
            {
                "token": None if values[i] == ENDED else int(values[i]),
                "baseline": float(arms[0][i]),
                "arm": float(arms[1][i]),
            }
            for i in order
            if arms[0][i] != arms[1][i]
        ]
        difference = float(excess / np.sqrt(variance)) if variance > 1e-12 else 0.0
        rows.append({"item_id": prompt, "position": position, "difference": difference, "tokens": shares})
    return rows


def worst_positions(positions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The few of ``position_differences`` that differ most, without those that do not differ."""
    differing = [row for row in positions if row["tokens"]]
    ranked = sorted(differing, key=lambda row: -row["difference"])[:NUM_WORST]
    return [{name: row[name] for name in ("item_id", "position", "tokens")} for row in ranked]


def _codes(column: np.ndarray) -> np.ndarray:
    """The values of [N] renumbered from 0, so that two columns can be joined without overflow."""
    import numpy as np

    return np.unique(column, return_inverse=True)[1]


def _kernel(codes: np.ndarray) -> np.ndarray:
    """Similarity [N, N] of which ``labels @ kernel @ labels`` sums the squared differences of all frequencies.

    Each is weighted by its count to the power -1/2: halfway between plain squares, which look at frequent values
    alone, and chi-square, which rare ones drown. A value seen once weighs the same under every permutation.
    """
    import numpy as np

    same = (codes[:, None] == codes[None, :]) / np.sqrt(np.bincount(codes)[codes])
    return same - same.mean(0) - same.mean(1, keepdims=True) + same.mean()


def _extreme(columns: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """The largest difference of one frequency, in standard deviations: [R]."""
    import numpy as np

    indicators = []
    for codes in columns:
        counts = np.bincount(codes)
        for code in np.flatnonzero((counts >= MIN_COUNT) & (counts <= len(codes) - MIN_COUNT)):
            share = counts[code] / len(codes)
            indicators.append(((codes == code) - share) / np.sqrt(len(codes) * share * (1 - share)))
    return np.abs(labels @ np.stack(indicators, axis=1)).max(1) if indicators else np.zeros(len(labels))


def _commonness(singles: list[np.ndarray], pairs: list[np.ndarray]) -> np.ndarray:
    """Log-probability [N] of each continuation under the frequencies of the *other* continuations of both arms."""
    import numpy as np

    def others(codes: np.ndarray) -> np.ndarray:
        return np.bincount(codes)[codes] - 1

    scores = np.zeros(len(singles[0]))
    for position, codes in enumerate(singles):
        probability = (others(codes) + 0.5) / (len(codes) - 1 + 0.5 * (codes.max() + 1))
        if position:
            context = others(singles[position - 1]) + BACK_OFF
            probability = (others(pairs[position - 1]) + BACK_OFF * probability) / context
        scores += np.log(probability)
    return scores
