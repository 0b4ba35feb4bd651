"""How often a step also reads prompts."""

from __future__ import annotations

import pytest

from serving.prompt_steps import PromptSteps


def test_it_is_the_share_of_the_recent_past():
    steps = PromptSteps()
    assert steps.per_token == 0.0
    for _ in range(400):
        steps.observe(4, 4, reads_prompts=True)
        for _ in range(15):
            steps.observe(4, 4, reads_prompts=False)
    assert steps.per_token == pytest.approx(1 / 16, rel=0.05)
    for _ in range(2000):
        steps.observe(4, 12, reads_prompts=False)
    assert steps.per_token == pytest.approx(0.0, abs=1e-4)


def test_the_first_prompts_are_not_taken_for_the_rule():
    """A load begins with as many prompts as sequences, whatever the answers' lengths are."""
    steps = PromptSteps()
    for _ in range(8):
        steps.observe(8, 8, reads_prompts=True)
    assert steps.per_token < 0.15
