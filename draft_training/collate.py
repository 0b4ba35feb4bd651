"""Windows of rows laid out as one batch: side by side, each padded to the longest, or several to a strip.

In a strip rows stand one behind another without padding, each with its true positions, and none sees another:
attention reaches from a token back to where its own row starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draft_training.feature_cache import RowFeatures
from draft_training.heads import FeatureBatch
from draft_training.padding import padded_length
from draft_training.windows import Window, anchor_positions
from specdec.traces import TokenRow

MAX_OPEN_STRIPS = 64  # that the next window may still go into: bounds the search, and costs no fill


def strips(windows: list[Window], pack_tokens: int | None) -> list[list[Window]]:
    """Each window in the first strip that has room for it, of at most ``pack_tokens`` tokens; None: one a strip.

    A longer window makes a strip of its own. What is laid again, strip by strip, comes out the same.
    """
    if pack_tokens is None:
        return [[window] for window in windows]
    laid: list[list[Window]] = []
    room: dict[int, int] = {}  # of the open strips
    for window in windows:
        place = next((i for i, left in room.items() if window.num_tokens <= left), len(laid))
        if place == len(laid):
            laid.append([])
            room[place] = pack_tokens
        laid[place].append(window)
        room[place] -= window.num_tokens
        if len(room) > MAX_OPEN_STRIPS:
            del room[min(room, key=room.__getitem__)]
    return laid


def strip_tokens(strip: list[Window]) -> int:
    """How long a strip is."""
    return sum(window.num_tokens for window in strip)


def collate(
    windows: list[Window],
    rows: Mapping[int, TokenRow],
    features: Mapping[int, RowFeatures],
    device: torch.device,
    pack_tokens: int | None,
) -> FeatureBatch:
    """The windows of ``rows`` as a batch, features in float32. The loss mask is cut to what the windows' anchors
    draft."""
    anchors = {
        window.row: torch.tensor(window_anchors(window, rows[window.row]), dtype=torch.long) for window in windows
    }
    placed: list[list[tuple[Window, int]]] = []  # a strip's windows, and the index where each starts
    for strip in strips(windows, pack_tokens):
        ends = itertools.accumulate(window.num_tokens for window in strip)
        placed.append([(window, end - window.num_tokens) for window, end in zip(strip, ends, strict=True)])

    def lay(piece: Callable[[Window, int], Tensor]) -> Tensor:
        whole = [torch.cat([piece(*place).to(device) for place in strip]) for strip in placed]
        padded = nn.utils.rnn.pad_sequence(whole, batch_first=True)
        missing = padded_length(padded.shape[1]) - padded.shape[1]
        return F.pad(padded, (0, 0) * (padded.ndim - 2) + (0, missing))

    def lay_feature(name: str) -> Tensor:
        def cut(window: Window, _start: int) -> Tensor:
            found = features[window.row]
            return getattr(found, name)[window.begin - found.begin : window.end - found.begin]

        return lay(cut)

    return FeatureBatch(
        anchors_BQ=lay(lambda w, start: anchors[w.row] + start),
        anchor_mask_BQ=lay(lambda w, _: torch.ones(len(anchors[w.row]), dtype=torch.bool)),
        input_ids_BT=lay(lambda w, _: torch.tensor(rows[w.row].input_ids[w.begin : w.end])),
        loss_mask_BT=lay(lambda w, _: _loss_mask(w, rows[w.row])),
        positions_BT=lay(lambda w, _: torch.arange(w.begin, w.end)),
        starts_BT=lay(lambda w, start: torch.full((w.num_tokens,), start)),
        ends_BT=lay(lambda w, start: torch.full((w.num_tokens,), start + w.num_tokens)),
        aux_hidden_BTAH=lay_feature("aux_hidden").float(),
        final_hidden_BTH=lay_feature("final_hidden").float(),
        logsumexp_BT=lay_feature("logsumexp"),
        argmax_BT=lay_feature("argmax"),
    )


def window_anchors(window: Window, row: TokenRow) -> list[int]:
    """The anchors of a window, counted from its first token."""
    return [t - window.begin for t in anchor_positions(row) if window.first <= t < window.stop]


def _loss_mask(window: Window, row: TokenRow) -> Tensor:
    mask = torch.tensor(row.loss_mask[window.begin : window.end]).bool()
    mask[: max(0, window.first + 2 - window.begin)] = False
    return mask
