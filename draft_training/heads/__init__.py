"""Draft architectures: one folder each, found by its name. The seam between a head and everything else.

A folder holds ``HEAD: HeadSpec`` in its ``__init__.py`` (torch-free), its model, loss, export and its own test.
The trainer, selection and the reference decoder know the ``DraftHead`` protocol and no architecture's name.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from draft_training.recipe import Objective
    from draft_training.target_model import TargetModel


@dataclass(kw_only=True, slots=True)
class DraftInputs:
    """What a head may read when it drafts. B strips, T tokens, Q anchors, H width, A aux layers.

    Index t holds token t and what the target computed on reading it: its distribution there is over token t + 1.
    An anchor t is where the server could draft: token t + 1 is known, token t + 2 is the first to be drafted.
    A strip holds a row, or several one behind another: what lies before a token's row is not seen from it. Of a long
    row it may be a window, so that its first token is not at position 0.
    """

    input_ids_BT: Tensor  # int64; one longer than the features when the last token has not been read yet
    anchors_BQ: Tensor  # int64 indices t, ascending; padding repeats index 0
    positions_BT: Tensor  # int64, of the tokens in their rows: the rotary positions
    starts_BT: Tensor  # int64, the index where the token's row starts; 0 throughout: one row a strip
    aux_hidden_BTAH: Tensor  # residual stream after the tapped layers, ascending; A = 0: the head taps none
    final_hidden_BTH: Tensor  # after the target's final norm


@dataclass(kw_only=True, slots=True)
class FeatureBatch(DraftInputs):
    """A right-padded batch with the target's features, and what it learns from."""

    loss_mask_BT: Tensor  # bool, True on completion tokens that some anchor drafts
    ends_BT: Tensor  # int64, the index behind the last token of the token's row
    anchor_mask_BQ: Tensor  # bool
    logsumexp_BT: Tensor  # float32, over the full vocabulary
    argmax_BT: Tensor  # int64, the target's greedy choice for token t + 1
    step_counts_2K: Tensor | None = None  # ``count_targets`` of the whole step, when this batch is a part of it


@dataclass(kw_only=True, slots=True)
class LossOutput:
    """One batch's loss, and counts to be summed before dividing."""

    loss: Tensor
    num_targets: list[int]  # supervised anchors at each draft position
    num_correct: list[int]  # of these, how often the head's argmax was the target's (out of vocabulary = wrong)


class DraftHead(Protocol):
    """What a head's ``torch.nn.Module`` offers."""

    aux_layer_ids: list[int]
    num_speculative_tokens: int
    draft_vocab_size: int
    draft_token_ids: Tensor  # target ids that it may draft, ascending

    def parameters(self) -> Any: ...

    def outputs(self, inputs: DraftInputs, own_drafts: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each draft position in turn: states [B, Q, H] and the matrix [V, H] that makes them draft logits.

        Position j reads the row's own tokens up to t + 1 + j, or with ``own_drafts`` what the head drafted before.
        What it says where the row has no such token counts nowhere.
        """
        ...

    def count_targets(self, batch: FeatureBatch) -> Tensor:
        """[2, K] int64: how many anchors each draft position is supervised at, and at how many its token exists."""
        ...

    def compute_loss(self, batch: FeatureBatch, objective: Objective) -> LossOutput:
        """Training loss of all draft positions. Means divide by ``batch.step_counts_2K`` where it is set, so that the
        losses of a step's parts add up to the loss of the whole step."""
        ...

    def draft_along(self, batch: FeatureBatch) -> Tensor:
        """[B, Q, K] target-vocabulary ids: position j of anchor t is drafted for token t + 2 + j,
        given the row's own tokens up to t + 1 + j (exact wherever the earlier drafts were accepted)."""
        ...

    def propose(self, aux_hidden_TAH: Tensor, final_hidden_TH: Tensor, input_ids: Tensor) -> list[int]:
        """Draft K tokens after ``input_ids`` [T + 1] from the features of its first T tokens, on the head's own
        drafts: the way the server does it."""
        ...

    def parameter_groups(self, learning_rate: float, lm_head_lr_scale: float, weight_decay: float) -> list[dict]:
        """Optimiser groups, of the ``kind`` "matrix", "vector" or "lm_head"; a scale of 0 freezes the lm_head."""
        ...

    def export(self, directory: Path, dtype: torch.dtype) -> None:
        """Write ``config.json`` and ``model.safetensors`` as vLLM loads them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSpec:
    """What one architecture folder offers, readable without torch."""

    name: str
    vllm_method: str
    paper: str
    options_cls: type  # keyword-only dataclass: this head's knobs
    builder: str  # "module:function"
    vllm_speculative: dict[str, Any] = field(default_factory=dict)  # further keys of --speculative-config

    def aux_layer_ids(self, options: Any, num_hidden_layers: int) -> list[int]:
        """The target layers to tap, ascending; id k is the residual stream after k layers."""
        return options.resolve_aux_layer_ids(num_hidden_layers)

    def draft_vocab_size(self, options: Any, vocab_size: int, token_counts: Counter[int]) -> int:
        """How many of the target's tokens the head may draft; the counts are of the rows' completions."""
        return options.resolve_draft_vocab_size(vocab_size, token_counts)

    def build(self, target: TargetModel, draft_token_ids: Tensor, options: Any, num_speculative_tokens: int) -> Any:
        """A new head for ``target``; ``draft_token_ids`` are the target ids it may draft, ascending."""
        module, _, function = self.builder.partition(":")
        build: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return build(target, draft_token_ids, options, num_speculative_tokens)


def resolve_aux_layers(wanted: list[int], num_hidden_layers: int) -> list[int]:
    """Ascending ids; id k is the residual stream after k layers (vLLM and HF ``hidden_states[k]`` agree).

    None wanted: low, middle, high, vLLM's own default.

    Raises:
        ValueError: an id outside 1 .. n - 1, or out of order.
    """
    n = num_hidden_layers
    ids = wanted or sorted({min(2, n - 1), n // 2, max(1, n - 3)})
    if ids != sorted(set(ids)) or ids[0] < 1 or ids[-1] >= n:
        raise ValueError(f"aux_layer_ids {ids} must ascend within 1 .. {n - 1}")
    return ids


def resolve_draft_vocab(size: int, coverage: float | None, vocab_size: int, token_counts: Counter[int]) -> int:
    """``size``, or with a ``coverage`` as few of the most frequent tokens as make up that share of all counted ones;
    at most the target's vocabulary.

    Raises:
        ValueError: a coverage that is no share.
    """
    if coverage is None:
        return min(size, vocab_size)
    if not 0 < coverage <= 1:
        raise ValueError(f"head.options.draft_vocab_coverage is a share above 0 and up to 1, got {coverage}")
    wanted, covered, num_tokens = coverage * token_counts.total(), 0, 0
    for _, count in token_counts.most_common():
        if covered >= wanted:
            break
        covered, num_tokens = covered + count, num_tokens + 1
    return max(1, num_tokens)


def list_heads() -> list[str]:
    """Names of the architecture folders."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def load_head(name: str) -> HeadSpec:
    """The named architecture.

    Raises:
        ValueError: no such folder.
    """
    if name not in list_heads():
        raise ValueError(f"unknown head {name!r}; known: {', '.join(list_heads())}")
    return importlib.import_module(f"draft_training.heads.{name}").HEAD
