"""The fused loss against autograd on its formula, in one chunk and in many."""

from __future__ import annotations

import pytest
import torch

from draft_training import loss


@pytest.mark.parametrize("chunk_logits", [7 * 3, 10**6])  # three rows at a time, and all at once
@pytest.mark.parametrize("is_frozen", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_chunks(monkeypatch, chunk_logits, is_frozen):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    torch.manual_seed(0)
    hidden = torch.randn(8, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=not is_frozen)
    probs = torch.rand(4, 7) / 7  # does not sum to 1: the rest lies outside the draft vocabulary
    ranks, weights = torch.tensor([0, 1, 2, 3, 3, 2, 0, 1]), torch.rand(8)

    fused, best = loss.SoftCrossEntropy.apply(hidden, weight, probs, ranks, weights)
    (2 * fused).backward()
    gradients = [tensor.grad for tensor in (hidden, weight)]
    hidden.grad = weight.grad = None

    logits = hidden @ weight.T
    plain = -(weights * (probs[ranks] * logits.log_softmax(-1)).sum(-1)).sum()
    (2 * plain).backward()
    torch.testing.assert_close(fused, plain)
    assert torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(gradients[0], hidden.grad)
    if is_frozen:
        assert gradients[1] is None
    else:
        torch.testing.assert_close(gradients[1], weight.grad)
