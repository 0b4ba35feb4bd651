"""Does an arm sample from the same distribution as the baseline? Greedy outputs can't tell: they never draw.

Both arms continue the same few prompts many times, and the frequencies of tokens are compared in several views:

- each token; each token with its predecessor; everything up to it. The latter two see a sampler whose positions
  are each right but do not follow from one another. Every frequency counts a little here.
- the one token, pair or prefix whose frequency differs most: a fault that strikes rarely, but hard.
- whether one arm's tokens are likelier than the other's altogether, as with another temperature or a top-p that is
  ignored; judged by the pooled frequencies and, where given, by the target's own surprise. Only the latter sees a
  verification that lets a few bad drafts pass: each of them is too rare for its frequency to tell.

The reference is a permutation of the arms within each prompt. It exchanges whole continuations, so it is exact
whatever the dependence between positions, and however few samples there are.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from specdec.evaluation.distribution_views import (
    ENDED,
    EXTREME,
    SIGNED,
    position_differences,
    prompt_views,
    worst_positions,
)
from specdec.evaluation.records import RequestResult

if TYPE_CHECKING:
    import numpy as np

SAMPLING_TEMPERATURE = 1.0  # with less, fewer tokens are drawn at all and there is less to compare
NO_TOKEN_IDS = "no_token_ids"
MAX_CONTEXTS = 512  # scored, those that most samples share first; the others count for no arm
NUM_TOP = 20  # log-probabilities asked for in each context; vLLM gives no more unless told to

Continuations = Sequence[tuple[int, ...]]
# By prompt id and prefix of a continuation.
Surprises = Mapping[str, Mapping[tuple[int, ...], float]]


class ChatClient(Protocol):
    """What collecting asks of a client."""

    async def chat(self, messages: list[dict[str, str]], max_tokens: int, temperature: float | None) -> RequestResult:
        """One answer; failures are in the result."""


class LogprobClient(Protocol):
    """What scoring asks of a client."""

    async def next_token_logprobs(self, token_ids: list[int], num_top: int = 5) -> dict[int, float]:
        """Log-probabilities (nats) of the ``num_top`` likeliest tokens after ``token_ids``, by token id."""


@dataclass(kw_only=True, slots=True)
class Samples:
    """Sampled continuations by prompt id, and how many requests gave none, by kind of error."""

    by_prompt: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    prompt_token_ids: dict[str, list[int]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)


async def collect_samples(
    client: ChatClient, prompts: Mapping[str, str], num_samples: int, num_tokens: int, concurrency: int
) -> Samples:
    """Continue each prompt ``num_samples`` times by ``num_tokens`` tokens, ``concurrency`` requests at a time.

    The rounds go over all prompts, so what disturbs the server for a while does not hit one prompt alone.

    Raises:
        ValueError: a count that is not positive.
    """
    if min(num_samples, num_tokens, concurrency) < 1:
        raise ValueError("the numbers of samples, tokens and requests in flight must be at least 1")
    samples = Samples(by_prompt={prompt: [] for prompt in prompts})
    queue = [prompt for _ in range(num_samples) for prompt in prompts]
    for start in range(0, len(queue), concurrency):
        batch = queue[start : start + concurrency]
        requests = [
            client.chat([{"role": "user", "content": prompts[prompt]}], num_tokens, SAMPLING_TEMPERATURE)
            for prompt in batch
        ]
        for prompt, result in zip(batch, await asyncio.gather(*requests), strict=True):
            if result.error or not result.token_ids:
                samples.errors[result.error or NO_TOKEN_IDS] += 1
            else:
                samples.by_prompt[prompt].append(tuple(result.token_ids[:num_tokens]))
                samples.prompt_token_ids[prompt] = result.prompt_token_ids
    return samples


async def prefix_surprises(
    client: LogprobClient, prompt_token_ids: Mapping[str, list[int]], samples: Sequence[Samples], concurrency: int
) -> dict[str, dict[tuple[int, ...], float]]:
    """How much the target is surprised by each token sampled: one request for each distinct context, of all arms.

    Args:
        client: of the baseline.
        prompt_token_ids: by prompt id; prompts that it lacks are not scored.
        samples: of the baseline and of all arms.
        concurrency: requests at a time.

    Returns:
        By prompt id and prefix of a continuation: the squared log-probability of the prefix's last token, less what
        the target expects of it in this context. The square tells bad drafts better than the plain one would, and
        without the expectation the contexts would differ more than the arms do.

    Raises:
        httpx.HTTPError: the server can't be reached or refuses.
        ValueError: it gives no log-probabilities.
    """
    contexts: dict[tuple[str, tuple[int, ...]], Counter[int]] = {}
    for rows_by_prompt in (drawn.by_prompt for drawn in samples):
        for prompt in rows_by_prompt.keys() & prompt_token_ids.keys():
            for row in rows_by_prompt[prompt]:
                for i, token in enumerate(row):
                    contexts.setdefault((prompt, row[:i]), Counter())[token] += 1
    surprises: dict[str, dict[tuple[int, ...], float]] = {prompt: {} for prompt in prompt_token_ids}
    queue = list(contexts)
    random.Random(0).shuffle(queue)  # or ties would go to the arm that was sampled first, and the arms would differ
    queue = sorted(queue, key=lambda context: -contexts[context].total())[:MAX_CONTEXTS]
    for start in range(0, len(queue), concurrency):
        batch = queue[start : start + concurrency]
        requests = [
            client.next_token_logprobs([*prompt_token_ids[prompt], *context], NUM_TOP) for prompt, context in batch
        ]
        for (prompt, context), top in zip(batch, await asyncio.gather(*requests), strict=True):
            for token in contexts[prompt, context]:
                surprises[prompt][(*context, token)] = _surprise(top, token)
    return surprises


def _surprise(top: Mapping[int, float], token: int) -> float:
    """A token that is not among the likeliest counts like the last of them."""
    weights = {candidate: math.exp(log_prob) for candidate, log_prob in top.items()}
    expected = sum(weights[candidate] * top[candidate] ** 2 for candidate in top) / sum(weights.values())
    return top.get(token, min(top.values())) ** 2 - expected


def two_sample_test(
    baseline: Mapping[str, Continuations],
    other: Mapping[str, Continuations],
    resamples: int = 2000,
    seed: int = 0,
    alpha: float = 0.001,
    surprises: Surprises | None = None,
) -> dict[str, Any]:
    """Test that both arms continue the prompts with the same probabilities.

    Args:
        baseline: token ids of the continuations by prompt id; one that ended early is simply shorter.
        other: the same of the arm; prompts that only one of them has are left out.
        resamples: permutations of the arms; the smallest possible p-value is ``1 / (1 + resamples)``.
        seed: of the permutations.
        alpha: ``lossy`` means a p-value below it, which a lossless arm gives at most this often.
        surprises: from ``prefix_surprises``, for much more power against bad drafts that pass.

    Returns:
        ``p_value``, ``statistic`` (standard deviations by which the most striking view exceeds what permuted arms
        give), ``num_prompts``, ``num_samples`` (a prompt and arm, the fewest), ``num_positions``, ``lossy`` and
        ``worst``: the positions that differ most, with the frequencies of the tokens that make the difference
        (token None: the continuation had ended). Without a prompt to compare, p-value, statistic and ``lossy``
        are None.

    Raises:
        ValueError: too few resamples to reach ``alpha``.
    """
    import numpy as np

    if 1 / (1 + resamples) >= alpha:
        raise ValueError(f"{resamples} resamples can't show a p-value below {alpha}: take at least {1 / alpha:g}")
    shared = [prompt for prompt, rows in baseline.items() if rows and other.get(prompt)]
    if not shared:
        return {
            "p_value": None, "statistic": None, "num_prompts": 0, "num_samples": 0, "num_positions": 0,
            "lossy": None, "worst": [],
        }  # fmt: skip
    rng = np.random.default_rng(seed)
    views: dict[str, np.ndarray] = {}
    positions: list[dict[str, Any]] = []
    width = max(len(row) for prompt in shared for row in (*baseline[prompt], *other[prompt]))
    for prompt in shared:
        rows = [*baseline[prompt], *other[prompt]]
        tokens = np.array([[*row, *[ENDED] * (width - len(row))] for row in rows], dtype=np.int64)
        observed = np.repeat([1.0, -1.0], [len(baseline[prompt]), len(other[prompt])])
        labels = np.vstack([observed, rng.permuted(np.tile(observed, (resamples, 1)), axis=1)])
        surprise = np.array(_total_surprise(rows, (surprises or {}).get(prompt, {})))
        _merge(views, prompt_views(tokens, labels, surprise))
        positions += position_differences(prompt, tokens, observed)
    # Standardised with the observed value among the permuted ones, which keeps all of them exchangeable.
    statistics = np.max([_standardised(view, values) for view, values in views.items()], axis=0)
    p_value = float(np.mean(statistics >= statistics[0] - 1e-9))  # the observed one counts: (1 + n) / (1 + resamples)
    return {
        "p_value": p_value,
        "statistic": float(statistics[0]),
        "num_prompts": len(shared),
        "num_samples": min(min(len(baseline[prompt]), len(other[prompt])) for prompt in shared),
        "num_positions": width,
        "lossy": p_value < alpha,
        "worst": worst_positions(positions),
    }


def _total_surprise(rows: Continuations, surprises: Mapping[tuple[int, ...], float]) -> list[float]:
    """Of each continuation. An unknown prefix counts 0, which is what the target expects."""
    return [sum(surprises.get(row[: i + 1], 0.0) for i in range(len(row))) for row in rows]


def _merge(views: dict[str, np.ndarray], of_prompt: dict[str, np.ndarray]) -> None:
    """Add one prompt: differences add up, the extreme remains the extreme."""
    import numpy as np

    for view, values in of_prompt.items():
        if view not in views:
            views[view] = values
        else:
            views[view] = np.maximum(views[view], values) if view == EXTREME else views[view] + values


def _standardised(view: str, values: np.ndarray) -> np.ndarray:
    import numpy as np

    sizes = np.abs(values) if view in SIGNED else values
    spread = sizes.std()
    return (sizes - sizes.mean()) / spread if spread > 1e-9 else np.zeros_like(sizes)
