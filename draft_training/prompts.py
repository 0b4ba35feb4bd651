"""The embedded task mix: endless verifiable reasoning prompts, made offline by reasoning-gym."""

from __future__ import annotations

from specdec.evaluation.suites.gym import draw_tasks, question


def embedded_prompts(num_prompts: int, seed: int) -> list[str]:
    """``num_prompts`` different prompts, the tasks taking turns; the same for the same arguments."""
    return [question(entry) for _, _, entry in draw_tasks(num_prompts, seed)]
