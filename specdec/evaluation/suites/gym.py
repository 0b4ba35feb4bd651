"""The embedded suite: verifiable reasoning tasks that reasoning-gym makes offline."""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

from specdec.evaluation.suites.base import BOXED_DIRECTIVE, Item, Suite, Verdict, make_suite
from specdec.evaluation.suites.maths import extract, number_of, strip_text
from specdec.record import text_sha256

# Draft heads' embedded training prompts are drawn from the same kinds.
TASKS = ("gsm_symbolic", "leg_counting", "simple_equations", "basic_arithmetic", "lcm", "time_intervals")
DEFAULT_NUM_ITEMS = 120
# reasoning-gym makes item i from seed + i. Training counts up from a small seed, evaluation from far above it.
FIRST_SEED, SEED_RANGE = 1_000_000_000, 1_000_000_000


def load_gym(num_items: int | None, seed: int) -> Suite:
    """``num_items`` (120 unless told) different tasks, the kinds taking turns; the same for the same arguments."""
    wanted = DEFAULT_NUM_ITEMS if num_items is None else num_items
    if wanted < 1:
        raise ValueError(f"the number of items is {wanted}; give at least 1")
    base = FIRST_SEED + int(text_sha256("evaluation", str(seed))[:8], 16) % SEED_RANGE
    items = [_item(*each) for each in draw_tasks(wanted, base)]
    version = importlib.metadata.version("reasoning-gym")
    return make_suite("reasoning_gym", f"reasoning-gym {version}", items, check_gym)


def draw_tasks(num_tasks: int, seed: int) -> list[tuple[str, int, dict[str, Any]]]:
    """``num_tasks`` different questions, the kinds taking turns: kind, number within it, the library's entry."""
    with warnings.catch_warnings():  # a dependency's own source, said once at its first import
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    per_task = -(-num_tasks // len(TASKS))
    columns = []
    for task in TASKS:
        dataset = reasoning_gym.create_dataset(task, size=2 * per_task, seed=seed)
        entries = {entry["question"].strip(): entry for entry in (dataset[i] for i in range(len(dataset)))}
        columns.append([(task, number, entry) for number, entry in enumerate(list(entries.values())[:per_task])])
    return [column[i] for i in range(per_task) for column in columns if i < len(column)][:num_tasks]


def _item(task: str, index: int, entry: dict[str, Any]) -> Item:
    return Item(
        suite="reasoning_gym",
        id=f"{task}-{index}",
        turns=(question(entry),),
        answer=str(entry["answer"]),
        category=task,
        context={"task": task, "entry": entry},
    )


def question(entry: dict[str, Any]) -> str:
    """As it is asked."""
    return f"{entry['question'].strip()}\n\n{BOXED_DIRECTIVE}"


def check_gym(item: Item, response: str) -> Verdict:
    """Judge with the task's own scorer: correct is a full score for the extracted answer."""
    from reasoning_gym.factory import get_score_answer_fn

    answer = extract(response, item.answer)
    if answer is None:
        return Verdict(correct=False, answer=None, reason="no answer")
    number = number_of(answer)
    voted = strip_text(answer) if number is None else str(number)
    score = get_score_answer_fn(item.context["task"])
    correct = any(score(form, item.context["entry"]) >= 1 for form in {answer, voted})
    return Verdict(correct=correct, answer=voted, reason=None if correct else "wrong answer")
