"""Acceptance as the server counts it: vLLM's Prometheus counters to ``AcceptanceCounts``."""

from __future__ import annotations

import re

from specdec.metrics import AcceptanceCounts

NUM_DRAFTS = "vllm:spec_decode_num_drafts_total"
NUM_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
NUM_ACCEPTED_TOKENS = "vllm:spec_decode_num_accepted_tokens_total"
NUM_ACCEPTED_PER_POS = "vllm:spec_decode_num_accepted_tokens_per_pos_total"

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?$")
_POSITION = re.compile(r'(?:^|,)\s*position="(\d+)"')

NUM_ENGINE_STEPS = "vllm:iteration_tokens_total_count"  # of the histogram of tokens a step: its number of steps


def engine_steps(before: str, after: str) -> int | None:
    """Engine steps between two scrapes; None when the server does not count them, or started anew."""

    def total(text: str) -> float | None:
        samples = [match for line in text.splitlines() if (match := _SAMPLE.match(line))]
        values = [float(sample["value"]) for sample in samples if sample["name"] == NUM_ENGINE_STEPS]
        return sum(values) if values else None

    first, last = total(before), total(after)
    return None if first is None or last is None or last < first else int(last - first)


def parse_acceptance(text: str) -> AcceptanceCounts:
    """Counters since the server's start, summed over engines and models.

    ``num_drafted_per_pos`` stays empty: vLLM does not export it; see ``window``.

    Raises:
        ValueError: a counter is absent (its name is given); absence never reads as 0.
    """
    totals: dict[str, float] = {}
    per_pos: dict[int, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        name, value = sample["name"], sample["value"]
        if name == NUM_ACCEPTED_PER_POS:
            position = _POSITION.search(sample["labels"] or "")
            if position:
                per_pos[int(position[1])] = per_pos.get(int(position[1]), 0) + float(value)
        elif name in (NUM_DRAFTS, NUM_DRAFT_TOKENS, NUM_ACCEPTED_TOKENS):
            totals[name] = totals.get(name, 0) + float(value)
    found = set(totals) | ({NUM_ACCEPTED_PER_POS} if per_pos else set())
    for wanted in (NUM_DRAFTS, NUM_DRAFT_TOKENS, NUM_ACCEPTED_TOKENS, NUM_ACCEPTED_PER_POS):
        if wanted not in found:
            raise ValueError(f"the server exports no {wanted}: it does not run vLLM's speculative decoding")
    if sorted(per_pos) != list(range(len(per_pos))):
        raise ValueError(f"the server exports {NUM_ACCEPTED_PER_POS} for positions {sorted(per_pos)}, not for 0..K-1")
    return AcceptanceCounts(
        num_drafts=int(totals[NUM_DRAFTS]),
        num_draft_tokens=int(totals[NUM_DRAFT_TOKENS]),
        num_accepted_tokens=int(totals[NUM_ACCEPTED_TOKENS]),
        num_accepted_per_pos=[int(per_pos[i]) for i in range(len(per_pos))],
    )


def window(before: AcceptanceCounts, after: AcceptanceCounts) -> tuple[AcceptanceCounts, str | None]:
    """Counts between two scrapes, and a note when per-position rates can't be known.

    Under one fixed K each draft tries each position, so ``num_drafted_per_pos[i] = num_drafts``. When K
    varied, both per-position vectors come back empty: accepted / num_drafts would be biased.

    Raises:
        ValueError: a counter went down: the server restarted in between.
    """
    counts = after - before
    if min(counts.num_drafts, counts.num_draft_tokens, counts.num_accepted_tokens, *counts.num_accepted_per_pos) < 0:
        raise ValueError("acceptance counters went down: the server restarted during the measurement")
    width = len(counts.num_accepted_per_pos)
    if counts.num_draft_tokens == width * counts.num_drafts:
        counts.num_drafted_per_pos = [counts.num_drafts] * width
        return counts, None
    counts.num_accepted_per_pos = []
    return counts, (
        f"not every draft had {width} tokens: vLLM's counters do not tell how often each position was drafted, so the "
        "rates by position are those that the requests report, if they do"
    )


def trained_acceptance(
    acceptance_by_prompt: dict[str, list[int]], prompt_hashes: list[str], trained_k: int, served_k: int | None
) -> tuple[AcceptanceCounts | None, str | None]:
    """What training measured on exactly these prompts, at the served K; None and the reason when it can't be told.

    A narrower served K is exact (a draft of width k accepts ``min(accepted, k)``); a wider one is unknown.
    """
    if not acceptance_by_prompt:
        return None, "the head's manifest carries no acceptance by prompt"
    missing = sum(text_hash not in acceptance_by_prompt for text_hash in prompt_hashes)
    if missing or not prompt_hashes:
        return None, f"{missing} of {len(prompt_hashes)} prompts are not among the head's held-out conversations"
    width = trained_k if served_k is None else served_k
    if width > trained_k:
        return None, f"served with K={width}, but training measured K={trained_k}"
    counts = AcceptanceCounts()
    for text_hash in prompt_hashes:
        for num_accepted in acceptance_by_prompt[text_hash]:
            counts.record(width, min(num_accepted, width))
    return counts, None
