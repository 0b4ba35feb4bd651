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
from torch.nn import functional as F

from draft_training.features import FeatureStore, anchor_positions, length_groups
from draft_training.heads import DraftHead, FeatureBatch
from specdec.metrics import AcceptanceCounts
from specdec.traces import TokenRow


@dataclass(kw_only=True, slots=True)
class HeldOutAcceptance:
    """Counts over all held-out rows, by span, and the accepted count of every draft by conversation."""

    total: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    by_span: dict[str, AcceptanceCounts] = field(default_factory=dict)
    accepted_by_conversation: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: list[HeldOutAcceptance]) -> HeldOutAcceptance:
        """Of disjoint sets of rows, as one."""
        result = cls()
        for part in parts:
            result.total += part.total
            for name, counts in part.by_span.items():
                result.by_span[name] = result.by_span.get(name, AcceptanceCounts()) + counts
            for name, accepted in part.accepted_by_conversation.items():
                result.accepted_by_conversation.setdefault(name, []).extend(accepted)
        return result


def accepted_prefix(drafts_BQK: Tensor, batch: FeatureBatch, on_policy: bool) -> Tensor:
    """[B, Q] number of draft tokens of each anchor that the server would accept, were it to draft there."""
    truth_BT = batch.input_ids_BT if on_policy else F.pad(batch.argmax_BT[:, :-1], (1, 0))
    last = truth_BT.shape[1] - 1
    right = []
    for j in range(drafts_BQK.shape[-1]):
        drafted_BQ = batch.anchors_BQ + 2 + j
        exists = drafted_BQ < batch.lengths_B[:, None]
        right.append((drafts_BQK[..., j] == truth_BT.gather(1, drafted_BQ.clamp(max=last))) & exists)
    return torch.stack(right, dim=-1).long().cumprod(-1).sum(-1)


def walk(accepted_by_anchor: dict[int, int], prompt_length: int) -> list[tuple[int, int]]:
    """(token index of the first drafted token, accepted) of each draft the server makes along one row.

    The prompt's forward yields token ``prompt_length``; drafting starts behind it and ends with the last token.
    """
    drafts = []
    anchor = prompt_length - 1
    while anchor in accepted_by_anchor:
        accepted = accepted_by_anchor[anchor]
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
        accepted_BQ = accepted_prefix(head.draft_along(batch), batch, on_policy).tolist()
        for index, accepted_Q in zip(group, accepted_BQ, strict=True):
            row = store.rows[index]
            by_anchor = dict(zip(anchor_positions(row), accepted_Q, strict=False))  # the rest is padding
            for token, accepted in walk(by_anchor, row.prompt_span[1]):
                result.total.record(width, accepted)
                result.by_span.setdefault(_span_name(row, token), AcceptanceCounts()).record(width, accepted)
                result.accepted_by_conversation.setdefault(row.conversation_id, []).append(accepted)
    return result


def _span_name(row: TokenRow, token: int) -> str:
    return "think" if row.think_span[0] <= token < row.think_span[1] else "answer"
