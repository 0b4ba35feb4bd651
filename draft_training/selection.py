"""Served-like acceptance on held-out conversations: the figure that picks the checkpoint.

The walk does what the server does with a greedy chain: from the last prompt token draft K tokens, accept the longest
right prefix, jump behind the bonus token, draft again. Along a row that the target produced itself this is exact,
also at temperature > 0: a greedily drafted token is accepted with the probability that the target samples it. Along
another model's trace the target's argmax stands in for the token, given the trace so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from draft_training.features import FeatureStore, length_groups
from draft_training.heads import DraftHead, FeatureBatch
from specdec.metrics import AcceptanceCounts
from specdec.traces import TokenRow


@dataclass(kw_only=True, slots=True)
class HeldOutAcceptance:
    """Counts over all held-out rows, by span, and the accepted count of every draft by conversation."""

    total: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    by_span: dict[str, AcceptanceCounts] = field(default_factory=dict)
    accepted_by_conversation: dict[str, list[int]] = field(default_factory=dict)


def accepted_prefix(drafts_BTK: Tensor, batch: FeatureBatch, on_policy: bool) -> Tensor:
    """[B, T] number of draft tokens of anchor t that the server would accept, were it to draft there."""
    truth_BT = batch.input_ids_BT if on_policy else torch.nn.functional.pad(batch.argmax_BT[:, :-1], (1, 0))
    T = truth_BT.shape[1]
    positions = torch.arange(T, device=truth_BT.device)
    right = []
    for j in range(drafts_BTK.shape[-1]):
        wanted = torch.nn.functional.pad(truth_BT[:, 2 + j :], (0, min(2 + j, T)))
        exists = positions[None] + 2 + j < batch.lengths_B[:, None]
        right.append((drafts_BTK[..., j] == wanted) & exists)
    return torch.stack(right, dim=-1).long().cumprod(-1).sum(-1)


def walk(accepted_T: list[int], prompt_length: int, length: int) -> list[tuple[int, int]]:
    """(token index of the first drafted token, accepted) of each draft the server makes along one row.

    The prompt's forward yields token ``prompt_length``; drafting starts behind it and ends with the last token.
    """
    drafts = []
    anchor = prompt_length - 1
    while anchor + 2 < length:
        accepted = accepted_T[anchor]
        drafts.append((anchor + 2, accepted))
        anchor += 1 + accepted
    return drafts


@torch.no_grad()
def held_out_acceptance(head: DraftHead, store: FeatureStore, on_policy: bool, batch_tokens: int) -> HeldOutAcceptance:
    """Walk every row of ``store``."""
    result = HeldOutAcceptance()
    width = head.num_speculative_tokens
    order = sorted(range(len(store.rows)), key=lambda i: len(store.rows[i].input_ids))
    for group in length_groups(order, store.rows, batch_tokens):
        batch = store.batch(group)
        accepted_BT = accepted_prefix(head.draft_along(batch), batch, on_policy).tolist()
        for index, accepted_T in zip(group, accepted_BT, strict=True):
            row = store.rows[index]
            for token, accepted in walk(accepted_T, row.prompt_span[1], len(row.input_ids)):
                result.total.record(width, accepted)
                result.by_span.setdefault(_span_name(row, token), AcceptanceCounts()).record(width, accepted)
                result.accepted_by_conversation.setdefault(row.conversation_id, []).append(accepted)
    return result


def _span_name(row: TokenRow, token: int) -> str:
    return "think" if row.think_span[0] <= token < row.think_span[1] else "answer"
