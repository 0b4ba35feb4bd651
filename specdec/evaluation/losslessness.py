"""Are the greedy outputs the same, and where they are not: a rounding tie, or a bug?

Verifying K + 1 tokens at once multiplies matrices of another shape than decoding one by one, and sums of
another shape round differently. Where two tokens have nearly the same logit, that can turn the argmax; the
text then goes another way. A fork between tokens that lie far apart has no such excuse.
"""

from __future__ import annotations

import asyncio
from typing import Any

from specdec.evaluation.arms import PLAIN, SPEC, Arm
from specdec.evaluation.client import ArmClient
from specdec.evaluation.measure import GREEDY, Measurement, Record
from specdec.metrics import first_divergence

TIE = "numeric tie"
BUG = "divergence: bug?"
UNKNOWN = "unexplained"
PROMPT_EXCERPT_CHARS = 160

# Two bf16 logits between 16 and 32 are at least 0.125 apart, so one rounding step moves a margin by that much.
TIE_MARGIN_NATS = {"float32": 0.05, "float16": 0.05, "bfloat16": 0.25}


def check_losslessness(measurement: Measurement, arms: dict[str, Arm], dtype: str) -> dict[str, Any]:
    """Compare the greedy outputs of the first repeat, prompt by prompt, and explain each fork.

    Returns:
        ``greedy_identity_rate`` plain against speculative, ``noise_floor_identity_rate`` plain against itself
        (the first two repeats), how many prompts each compares, and ``forks``. A rate without a prompt is None.
    """
    mode = measurement.modes.get(GREEDY)
    records = mode.records if mode else []
    plain, again, spec = (_outputs(records, *key) for key in ((PLAIN, 0), (PLAIN, 1), (SPEC, 0)))
    threshold = TIE_MARGIN_NATS.get(dtype, TIE_MARGIN_NATS["float32"])
    shared = sorted(plain.keys() & spec.keys())
    forked = [index for index in shared if _fork_position(plain[index], spec[index]) is not None]
    repeated = sorted(plain.keys() & again.keys())
    noisy = [index for index in repeated if _fork_position(plain[index], again[index]) is not None]
    return {
        "greedy_identity_rate": (len(shared) - len(forked)) / len(shared) if shared else None,
        "num_compared": len(shared),
        "noise_floor_identity_rate": (len(repeated) - len(noisy)) / len(repeated) if repeated else None,
        "num_noise_floor_compared": len(repeated),
        "tie_margin_nats": threshold,
        "forks": asyncio.run(_explain(measurement, plain, spec, forked, arms[PLAIN], threshold)),
    }


def _outputs(records: list[Record], arm: str, repeat: int) -> dict[int, Record]:
    """By prompt; requests that failed or came without token ids are left out (errors are counted elsewhere)."""
    return {
        record.prompt_index: record
        for record in records
        if record.arm == arm and record.repeat == repeat and not record.result.error and record.result.token_ids
    }


def _fork_position(a: Record, b: Record) -> int | None:
    """Index of the first differing output token; -1 when already the prompts were rendered differently."""
    if a.result.prompt_token_ids != b.result.prompt_token_ids:
        return -1
    return first_divergence(a.result.token_ids, b.result.token_ids)


async def _explain(
    measurement: Measurement,
    plain: dict[int, Record],
    spec: dict[int, Record],
    forked: list[int],
    arm: Arm,
    threshold: float,
) -> list[dict[str, Any]]:
    async with ArmClient(arm) as client:
        return [
            {
                "prompt_index": index,
                "prompt_excerpt": measurement.prompts[index][:PROMPT_EXCERPT_CHARS],
                **await _explain_fork(client, plain[index], spec[index], threshold),
            }
            for index in forked
        ]


async def _explain_fork(client: ArmClient, plain: Record, spec: Record, threshold: float) -> dict[str, Any]:
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
        return {**fork, "why": f"one output ended early: {len(a)} tokens plain, {len(b)} speculative"}
    fork |= {"plain_token": a[position], "spec_token": b[position]}
    try:
        logprobs = await client.next_token_logprobs([*plain.result.prompt_token_ids, *a[:position]])
    except (httpx.HTTPError, ValueError) as error:
        return {**fork, "verdict": UNKNOWN, "why": f"the plain server gave no log-probabilities: {error}"}
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
