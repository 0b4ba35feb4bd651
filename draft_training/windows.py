"""Which part of a row is drawn: short rows whole, long ones as windows over the positions where a head drafts.

A row with more such positions (anchors) than ``train.window_tokens`` is cut into windows at a random phase. One is
drawn an epoch, in random order and none twice before all were, so that every position is drawn equally often. The
target has read the whole prefix, and the head attends to it. Nothing is truncated: what the epochs do not reach is
counted (``Coverage``).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

from specdec.config import TrainConfig
from specdec.traces import TokenRow

Tiles = list["Window"]  # of one row, in order; together they hold each anchor once


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Tokens ``begin`` .. ``end`` of a row, and the anchors ``first`` .. ``stop`` to draft at; half-open indices."""

    row: int
    begin: int
    end: int
    first: int
    stop: int
    num_anchors: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What a run's windows reach of its rows."""

    num_rows: int
    num_windowed_rows: int  # longer than a window
    num_positions: int  # where a head could draft
    num_covered: int  # drawn in one epoch at least

    @property
    def share(self) -> float:
        return self.num_covered / self.num_positions if self.num_positions else 1.0


def anchor_positions(row: TokenRow) -> list[int]:
    """Indices t at which the server could draft: tokens t + 1 (just sampled) and t + 2 belong to the completion."""
    mask = row.loss_mask
    return [t for t in range(len(mask) - 2) if mask[t + 1] and mask[t + 2]]


def whole_row(index: int, row: TokenRow) -> Window:
    """All of a row."""
    length = len(row.input_ids)
    return Window(row=index, begin=0, end=length, first=0, stop=length, num_anchors=len(anchor_positions(row)))


def tiles(
    index: int, row: TokenRow, window_tokens: int, num_drafts: int, prefix_tokens: int | None = None, phase: int = 0
) -> Tiles:
    """The row in windows of at most ``window_tokens`` anchors, the first one of ``phase`` (0: as many as the others).

    A window also holds the tokens that its anchors draft, and before its first anchor ``prefix_tokens`` more (None:
    all that there are). A row that fits one window is one, whole.
    """
    anchors = anchor_positions(row)
    if len(anchors) <= window_tokens:
        return [whole_row(index, row)]
    windows = []
    edges = [0, *range(phase or window_tokens, len(anchors), window_tokens), len(anchors)]
    for start, stop in itertools.pairwise(edges):
        first, last = anchors[start], anchors[stop - 1]
        windows.append(
            Window(
                row=index,
                begin=0 if prefix_tokens is None else max(0, first - prefix_tokens),
                end=min(len(row.input_ids), last + 2 + num_drafts),
                first=first,
                stop=last + 1,
                num_anchors=stop - start,
            )
        )
    return windows


def plan_windows(rows: Iterable[TokenRow], config: TrainConfig, num_drafts: int) -> list[Tiles]:
    """The windows of each row, from the seed alone.

    Raises:
        ValueError: a window without tokens, or fewer than none before it.
    """
    if config.window_tokens < 1:
        raise ValueError(f"train.window_tokens must be at least 1, got {config.window_tokens}")
    if config.prefix_tokens is not None and config.prefix_tokens < 0:
        raise ValueError(f"train.prefix_tokens must be at least 0, or null for all, got {config.prefix_tokens}")
    planned = []
    for index, row in enumerate(rows):
        phase = random.Random(f"{config.seed}/{index}").randint(1, config.window_tokens)
        planned.append(tiles(index, row, config.window_tokens, num_drafts, config.prefix_tokens, phase))
    return planned


def draw(planned: list[Tiles], seed: int, epoch: int) -> list[Window]:
    """One window of each row."""
    return [windows[_place(windows, seed, epoch)] for windows in planned]


def _place(windows: Tiles, seed: int, epoch: int) -> int:
    if len(windows) == 1:
        return 0
    round_number, place = divmod(epoch, len(windows))
    order = random.Random(f"{seed}/{windows[0].row}/{round_number}").sample(range(len(windows)), len(windows))
    return order[place]


def coverage(planned: list[Tiles], batches: Iterable[list[Window]]) -> Coverage:
    """What all batches reach together."""
    drawn = {window for batch in batches for window in batch}
    return Coverage(
        num_rows=len(planned),
        num_windowed_rows=sum(len(windows) > 1 for windows in planned),
        num_positions=sum(window.num_anchors for windows in planned for window in windows),
        num_covered=sum(window.num_anchors for window in drawn),
    )
