"""The acceptance that picks a checkpoint, told by span: on a head that is known to be right in thoughts alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from draft_training.features import FeatureStore
from draft_training.selection import held_out_acceptance
from draft_training.target_model import TargetModel
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target

K = 3
PROMPT, THOUGHT, END = 5, 25, 45  # where each ends


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    files = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path_factory.mktemp("target")))))
    return TargetModel.load(files, "float32", Device(kind="cpu", core_ids=(0,), native_bf16=False))


def row(shift: int) -> TokenRow:
    return TokenRow(
        conversation_id=f"c{shift}", prompt="p", input_ids=[1 + shift + i for i in range(END + shift)],
        prompt_span=(0, PROMPT), think_span=(PROMPT, THOUGHT + shift), answer_span=(THOUGHT + shift, END + shift),
        loss_mask=[int(i >= PROMPT) for i in range(END + shift)],
    )  # fmt: skip


class Thinker(SimpleNamespace):
    """Knows each token of a thought, and none of an answer: tokens count up, and a row's first one is its shift + 1."""

    num_speculative_tokens = K

    def draft_along(self, batch):
        shift = batch.input_ids_BT[:, :1, None] - 1
        index = batch.anchors_BQ[:, :, None] + 2 + torch.arange(K)
        return torch.where(index < THOUGHT + shift, 1 + shift + index, 0)


def test_drafts_count_for_the_span_that_they_begin_in(target):
    rows = [row(0), row(3)]
    store = FeatureStore(target, rows, [], 2**30)
    found = held_out_acceptance(Thinker(), store, True, 4096)
    wanted = {"think": [0, 0], "answer": [0, 0]}  # drafts, accepted tokens
    for shift in (0, 3):
        first = PROMPT + 1  # the prompt's forward gives the token before
        while first < END + shift:
            accepted = max(0, min(K, THOUGHT + shift - first))
            counts = wanted["think" if first < THOUGHT + shift else "answer"]
            counts[0], counts[1] = counts[0] + 1, counts[1] + accepted
            first += accepted + 1
    spans = {name: [counts.num_drafts, counts.num_accepted_tokens] for name, counts in found.by_span.items()}
    assert spans == wanted and wanted["answer"][1] == 0 < wanted["think"][1]
    figures = found.figures()["by_span"]
    assert figures["answer"]["acceptance_length"] == 1.0 and figures["think"]["acceptance_length"] > 3
