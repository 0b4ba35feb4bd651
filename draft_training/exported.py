"""A finished head, opened again: what training's own walk accepts of it on answers that the target gave.

A server's answers part from the rows that training held out wherever two tokens tie, and their acceptance with them.
On the very same answers nothing is left to chance: what then differs is the head that is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draft_training.heads import load_head
from draft_training.tokenizer import load_tokenizer
from draft_training.warm_start import drafted_tokens, head_config_of, load_weights
from specdec.config import HeadConfig, RunConfig, from_dict
from specdec.device import detect_device
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts
from specdec.targets import resolve_target
from specdec.traces import row_from_ids

BATCH_TOKENS = 2048

TokenIds = list[int]


def open_head(directory: Path, target_model: Any) -> Any:
    """The head in ``directory`` as training built it, on the target's device.

    Raises:
        ValueError: not a head that ``specdec train`` made, or its files are damaged.
    """
    import torch

    config = head_config_of(directory, HeadConfig())
    spec = load_head(config.name)
    options = from_dict(spec.options_cls, config.options, "head.options.")
    draft_ids = torch.tensor(drafted_tokens(directory, int(target_model.config.vocab_size)))
    head = spec.build(target_model, draft_ids, options, config.num_speculative_tokens)
    load_weights(head, directory)
    return head.to(target_model.device)


def acceptance_on(config: RunConfig, directory: Path, answers: list[tuple[TokenIds, TokenIds]]) -> AcceptanceCounts:
    """What a server that drafts greedily with this head accepts on its way through these (prompt, answer) pairs.

    Raises:
        ValueError: no answers, a head of another target, or one that ``specdec train`` did not make.
    """
    from draft_training.features import FeatureStore
    from draft_training.selection import held_out_acceptance
    from draft_training.target_model import TargetModel

    if not answers:
        raise ValueError("the server returned no answers with their tokens: nothing to measure the head on")
    target, device = resolve_target(config.target), detect_device()
    HeadManifest.load(directory).check_target(target.fingerprint())
    target_model = TargetModel.load(target, device.settled(config.target.dtype), device)
    head, tokenizer = open_head(directory, target_model), load_tokenizer(target)
    rows = [row_from_ids(tokenizer, str(number), *answer) for number, answer in enumerate(answers)]
    store = FeatureStore(target_model, rows, head.aux_layer_ids, 0)
    return held_out_acceptance(head, store, on_policy=True, batch_tokens=BATCH_TOKENS).total
