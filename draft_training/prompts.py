"""The embedded task mix: endless verifiable reasoning prompts, made offline by reasoning-gym."""

from __future__ import annotations

from specdec.evaluation.suites.base import BOXED_DIRECTIVE

EMBEDDED_TASKS = ("gsm_symbolic", "leg_counting", "simple_equations", "basic_arithmetic", "lcm", "time_intervals")


def embedded_prompts(num_prompts: int, seed: int) -> list[str]:
    """``num_prompts`` different prompts, the tasks taking turns; the same for the same arguments."""
    import reasoning_gym

    per_task = -(-num_prompts // len(EMBEDDED_TASKS))
    columns = []
    for task in EMBEDDED_TASKS:
        dataset = reasoning_gym.create_dataset(task, size=2 * per_task, seed=seed)
        unique = dict.fromkeys(f"{dataset[i]['question'].strip()}\n\n{BOXED_DIRECTIVE}" for i in range(len(dataset)))
        columns.append(list(unique)[:per_task])
    turns = [column[i] for i in range(per_task) for column in columns if i < len(column)]
    return turns[:num_prompts]
