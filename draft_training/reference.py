"""Speculative decoding in plain torch, greedy, one sequence: what everything faster is tested against.

One round (Leviathan et al., arXiv 2211.17192, at temperature 0): the head drafts K tokens, one target forward reads
them all, the longest prefix that the target itself would have produced is kept, and the target's own next token is
added. Nothing is cached; clarity is the point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draft_training.heads import DraftHead
from draft_training.target_model import TargetModel
from specdec.metrics import AcceptanceCounts


@dataclass(kw_only=True, slots=True)
class Decoded:
    """New token ids, and the counts of the rounds that made them."""

    output_ids: list[int]
    counts: AcceptanceCounts
    accepted: list[int]


def greedy_decode(target: TargetModel, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Plain decode: the argmax of the target, one forward a token."""
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        ids.append(int(target.forward_rows([ids], [])[0].argmax[-1]))
    return ids[len(prompt_ids) :]


@torch.no_grad()
def speculative_decode(target: TargetModel, head: DraftHead, prompt_ids: list[int], max_new_tokens: int) -> Decoded:
    """Greedy speculative decode; its output equals ``greedy_decode``'s, whatever the head drafts."""
    ids = list(prompt_ids)
    counts, accepted_per_draft = AcceptanceCounts(), []
    features = target.forward_rows([ids], head.aux_layer_ids)[0]
    ids.append(int(features.argmax[-1]))
    while len(ids) - len(prompt_ids) < max_new_tokens:
        drafts = head.propose(features.aux_hidden.float(), features.final_hidden.float(), torch.tensor(ids))
        verified = target.forward_rows([ids + drafts], head.aux_layer_ids)[0]
        choices = verified.argmax[len(ids) - 1 :].tolist()  # the target's token after ids, after ids + 1 draft, ...
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == choices[num_accepted]:
            num_accepted += 1
        counts.record(len(drafts), num_accepted)
        accepted_per_draft.append(num_accepted)
        ids += choices[: num_accepted + 1]
        features = target.forward_rows([ids[:-1]], head.aux_layer_ids)[0]
    return Decoded(
        output_ids=ids[len(prompt_ids) : len(prompt_ids) + max_new_tokens], counts=counts, accepted=accepted_per_draft
    )
