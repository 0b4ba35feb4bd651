"""Served-like acceptance on held-out conversations: the figure that picks the checkpoint.

The walk does what the server does with a greedy chain: from the last prompt token draft K tokens, accept the longest
right prefix, jump behind the bonus token, draft again. Long rows are drafted in windows, each with its whole prefix,
as the server would; the walk itself goes through the row. Along a row that the target produced itself this is exact,
also at temperature > 0: a greedily drafted token is accepted with the probability that the target samples it. Along
another model's trace the target's argmax stands in for the token, given the trace so far.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from draft_training.features import FeatureStore, length_groups
from draft_training.heads import DraftHead, FeatureBatch
from draft_training.windows import Window, anchor_positions, tiles, whole_row
from specdec.metrics import OUTPUT_BUCKET_TOKENS, AcceptanceCounts
from specdec.traces import TokenRow

WINDOW_TOKENS = 1024  # drafted at once of a row; bounds memory, changes no result


@dataclass(kw_only=True, slots=True)
class HeldOutAcceptance:
    """Counts over all held-out rows, by span, by where in the output a draft begins (the start of its
    ``OUTPUT_BUCKET_TOKENS`` bucket), and the accepted count of every draft by conversation."""

    total: AcceptanceCounts = field(default_factory=AcceptanceCounts)
    by_span: dict[str, AcceptanceCounts] = field(default_factory=dict)
    by_output_position: dict[int, AcceptanceCounts] = field(default_factory=dict)
    accepted_by_conversation: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: list[HeldOutAcceptance]) -> HeldOutAcceptance:
        """Of disjoint sets of rows, as one."""
        result = cls()
        for part in parts:
            result.total += part.total
            for name, counts in part.by_span.items():
                result.by_span[name] = result.by_span.get(name, AcceptanceCounts()) + counts
            for start, counts in part.by_output_position.items():
                result.by_output_position[start] = result.by_output_position.get(start, AcceptanceCounts()) + counts
            for name, accepted in part.accepted_by_conversation.items():
                result.accepted_by_conversation.setdefault(name, []).extend(accepted)
        return result

    def figures(self) -> dict[str, Any]:
        """What a manifest says of it."""
        ends = dict(itertools.pairwise(OUTPUT_BUCKET_TOKENS))
        along = [
            {"start": start, "end": ends.get(start), **_figures(counts)}
            for start, counts in sorted(self.by_output_position.items())
        ]
        return {
            **_figures(self.total),
            "by_span": {name: _figures(counts) for name, counts in self.by_span.items()},
            "by_output_position": along,
        }


def _figures(counts: AcceptanceCounts) -> dict[str, Any]:
    return {
        **dataclasses.asdict(counts),
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "per_position_rates": counts.per_position_rates,
    }


def accepted_prefix(drafts_BQK: Tensor, batch: FeatureBatch, on_policy: bool) -> Tensor:
    """[B, Q] number of draft tokens of each anchor that the server would accept, were it to draft there."""
    truth_BT = batch.input_ids_BT if on_policy else F.pad(batch.argmax_BT[:, :-1], (1, 0))
    last, ends_BQ = truth_BT.shape[1] - 1, batch.ends_BT.gather(1, batch.anchors_BQ)
    right = []
    for j in range(drafts_BQK.shape[-1]):
        drafted_BQ = batch.anchors_BQ + 2 + j
        exists = drafted_BQ < ends_BQ
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
def held_out_acceptance(
    head: DraftHead, store: FeatureStore, on_policy: bool, batch_tokens: int, rows: Iterable[int] | None = None
) -> HeldOutAcceptance:
    """Walk these rows of ``store``; None: every row."""
    result = HeldOutAcceptance()
    width = head.num_speculative_tokens
    order = sorted(range(len(store.rows)) if rows is None else rows, key=store.lengths.__getitem__)
    for group in length_groups(order, store.lengths.__getitem__, batch_tokens):
        for index, by_anchor in _accepted_by_anchor(head, store, group, on_policy).items():
            row = store.rows[index]
            for token, accepted in walk(by_anchor, row.prompt_span[1]):
                result.total.record(width, accepted)
                result.by_span.setdefault(_span_name(row, token), AcceptanceCounts()).record(width, accepted)
                bucket = max(start for start in OUTPUT_BUCKET_TOKENS if start <= token - row.prompt_span[1])
                result.by_output_position.setdefault(bucket, AcceptanceCounts()).record(width, accepted)
                result.accepted_by_conversation.setdefault(row.conversation_id, []).append(accepted)
    return result


def _accepted_by_anchor(
    head: DraftHead, store: FeatureStore, group: list[int], on_policy: bool
) -> dict[int, dict[int, int]]:
    """By row: of each anchor, how many of its draft tokens would be accepted."""
    rows = {index: store.rows[index] for index in group}
    features = store.features([whole_row(index, row) for index, row in rows.items()])
    accepted: dict[int, dict[int, int]] = {index: {} for index in group}
    windows = [tiles(index, row, WINDOW_TOKENS, head.num_speculative_tokens) for index, row in rows.items()]
    for together in itertools.zip_longest(*windows):  # the rows' first windows, their second ones, ...
        part: list[Window] = [window for window in together if window is not None]
        batch = store.window_batch(part, features)
        accepted_BQ = accepted_prefix(head.draft_along(batch), batch, on_policy).tolist()
        for window, accepted_Q in zip(part, accepted_BQ, strict=True):
            anchors = [t for t in anchor_positions(rows[window.row]) if window.first <= t < window.stop]
            accepted[window.row].update(zip(anchors, accepted_Q, strict=False))  # the rest is padding
    return accepted


def _span_name(row: TokenRow, token: int) -> str:
    return "think" if row.think_span[0] <= token < row.think_span[1] else "answer"
