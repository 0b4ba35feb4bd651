"""Are the greedy outputs the same, and where they are not: a rounding tie, or a bug?

Verifying K + 1 tokens at once multiplies matrices of another shape than decoding one by one, and sums of
another shape round differently. Where two tokens have nearly the same logit, that can turn the argmax; the
text then goes another way. A fork between tokens that lie far apart has no such excuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from specdec.evaluation.records import Measurement, Record
from specdec.metrics import first_divergence

TIE = "numeric tie"
BUG = "divergence: bug?"
UNKNOWN = "unexplained"
PROMPT_EXCERPT_CHARS = 160

# bf16 logits between 16 and 32 lie in steps of 0.125; when two of them round apart, a margin moves by two steps.
TIE_MARGIN_NATS = {"float32": 0.05, "float16": 0.05, "bfloat16": 0.3}


class LogprobClient(Protocol):
    """What the fork analysis asks of the baseline server."""

    async def next_token_logprobs(self, token_ids: list[int], /) -> dict[int, float]:
        """Log-probabilities (nats) of the likeliest tokens after ``token_ids``, by token id."""

    async def detokenize(self, token_id: int, /) -> str | None:
        """Text of one token; None where the server can't tell."""


async def check_greedy(
    measurement: Measurement, baseline_client: LogprobClient, dtype: str, prompt_text: Callable[[Record], str]
) -> list[dict[str, Any]]:
    """Compare the greedy outputs of each arm with the baseline's, task by task, and explain each fork.

    Outputs are those of repeat 0. A later turn counts only where both arms were given the same prompt: after
    a fork the conversations differ, and so may the answers.

    Args:
        measurement: all cells; those that are not greedy are left alone.
        baseline_client: the server that tells how far apart two tokens lie.
        dtype: of the target's weights as served; sets how far apart rounding can explain.
        prompt_text: the text of a record's prompt, for an excerpt.

    Returns:
        One row for each greedy cell and arm: ``greedy_identity_rate`` of the arm, ``noise_floor_identity_rate`` of
        the baseline against itself (repeats 0 and 1), how many tasks each compares, and ``forks``. A rate without
        a task is None.
    """
    threshold = TIE_MARGIN_NATS.get(dtype, TIE_MARGIN_NATS["float32"])
    rows = []
    for cell in measurement.cells:
        if not cell.is_greedy:
            continue
        baseline = _outputs(measurement, cell.name, measurement.baseline, 0)
        floor, num_floor, _ = _identity(baseline, _outputs(measurement, cell.name, measurement.baseline, 1))
        for arm in measurement.arms:
            if arm == measurement.baseline:
                continue
            rate, num_compared, forked = _identity(baseline, _outputs(measurement, cell.name, arm, 0))
            forks = [
                {
                    "suite": plain.suite, "item_id": plain.item_id, "sample": plain.sample, "turn": plain.turn,
                    "prompt_excerpt": prompt_text(plain)[:PROMPT_EXCERPT_CHARS],
                    **await _explain_fork(baseline_client, plain, spec, threshold),
                }
                for plain, spec in forked
            ]  # fmt: skip
            rows.append(
                {
                    "arm": arm, "cell": cell.name, "greedy_identity_rate": rate, "num_compared": num_compared,
                    "noise_floor_identity_rate": floor, "num_noise_floor_compared": num_floor,
                    "tie_margin_nats": threshold, "forks": forks,
                }
            )  # fmt: skip
    return rows


def _outputs(measurement: Measurement, cell: str, arm: str, repeat: int) -> dict[str, Record]:
    """By task; requests that failed or came without token ids are left out (errors are counted elsewhere)."""
    return {
        record.key: record
        for record in measurement.records(cell, arm)
        if record.repeat == repeat and not record.result.error and record.result.token_ids
    }


def _identity(
    plain: dict[str, Record], other: dict[str, Record]
) -> tuple[float | None, int, list[tuple[Record, Record]]]:
    """Share of identical outputs, number of comparable tasks, and the pairs that fork."""
    pairs = [(record, other[key]) for key, record in plain.items() if key in other]
    pairs = [(a, b) for a, b in pairs if a.turn == 0 or a.result.prompt_token_ids == b.result.prompt_token_ids]
    forked = [(a, b) for a, b in pairs if _fork_position(a, b) is not None]
    return (len(pairs) - len(forked)) / len(pairs) if pairs else None, len(pairs), forked


def _fork_position(a: Record, b: Record) -> int | None:
    """Index of the first differing output token; -1 when already the prompts were rendered differently."""
    if a.result.prompt_token_ids != b.result.prompt_token_ids:
        return -1
    return first_divergence(a.result.token_ids, b.result.token_ids)


async def _explain_fork(client: LogprobClient, plain: Record, spec: Record, threshold: float) -> dict[str, Any]:
    import httpx

    position = _fork_position(plain, spec)
    assert position is not None
    fork: dict[str, Any] = {
        "position": position, "plain_token": None, "spec_token": None, "plain_text": None, "spec_text": None,
        "margin_nats": None, "margin_is_lower_bound": False, "verdict": BUG,
    }  # fmt: skip
    if position < 0:
        return {**fork, "why": "the arms rendered different prompts: not the same target or chat template"}
    a, b = plain.result.token_ids, spec.result.token_ids
    if position >= min(len(a), len(b)):
        return {**fork, "why": f"one output ended early: {len(a)} tokens of the baseline, {len(b)} of the arm"}
    fork |= {"plain_token": a[position], "spec_token": b[position]}
    if not plain.result.prompt_token_ids:
        return {**fork, "verdict": UNKNOWN, "why": "the baseline server returned no prompt token ids to ask about"}
    try:
        logprobs = await client.next_token_logprobs(plain.result.context_ids(position))
    except (httpx.HTTPError, ValueError) as error:
        return {**fork, "verdict": UNKNOWN, "why": f"the baseline server gave no log-probabilities: {error}"}
    fork |= {"plain_text": await client.detokenize(a[position]), "spec_text": await client.detokenize(b[position])}
    return {**fork, **judge_margin(logprobs, a[position], b[position], threshold)}


def judge_margin(logprobs: dict[int, float], plain_token: int, spec_token: int, threshold: float) -> dict[str, Any]:
    """Margin in nats between the likelier of two tokens and the other, and the verdict on it.

    A token outside ``logprobs`` (the top few) is at most as likely as the last of them: the margin is then a
    lower bound.
    """
    if not logprobs:
        return {"verdict": UNKNOWN, "why": "the plain server gave no log-probabilities"}
    floor = min(logprobs.values())
    pair = [logprobs.get(plain_token, floor), logprobs.get(spec_token, floor)]
    is_bound = plain_token not in logprobs or spec_token not in logprobs
    # Both must be near the top: two tokens that tie far below the likeliest one explain nothing.
    margin = max(logprobs.values()) - min(pair)
    tie = margin < threshold and not is_bound
    why = (
        f"the two tokens lie {margin:.4f} nats apart: verification runs other batch shapes than plain decode, "
        "whose sums round differently, and that turned the argmax"
        if tie
        else f"the tokens lie {'at least ' if is_bound else ''}{margin:.4f} nats apart, more than rounding explains "
        f"({threshold} nats)"
    )
    return {"margin_nats": margin, "margin_is_lower_bound": is_bound, "verdict": TIE if tie else BUG, "why": why}
