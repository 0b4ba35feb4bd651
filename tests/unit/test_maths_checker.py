"""Who judges an answer right: maths by number and by symbol, exact text, and reasoning-gym by its own scorer."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.evaluation.suites import Item, load_suite
from specdec.evaluation.suites.equivalence import SymbolicComparer
from specdec.evaluation.suites.maths import canonical, check_exact, check_maths, extract, is_equivalent, last_boxed

DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."


def maths(answer: str | None) -> Item:
    return Item(suite="s", id="1", turns=("?",), answer=answer)


def boxed(answer: str) -> str:
    return f"<think>\nmaybe \\boxed{{0}}\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72"),
        ("72", "\\$72"),
        ("72", "72.0"),
        ("72", "72 \\text{ dollars}"),
        ("72", "72 dollars"),
        ("1,004", "1004"),
        ("11,\\! 111,\\! 100", "11111100"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "\\dfrac12"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("5", "x=5"),
        ("90^\\circ", "90"),
        ("50", "50\\%"),
        ("\\text{(C)}", "C"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("1,2,3", "3, 2, 1"),
        ("\\text{Evelyn}", "Evelyn"),
        ("033", "33"),
    ],
)
def test_equal_answers_are_right(gold: str, answer: str):
    verdict = check_maths(maths(gold), boxed(answer))
    assert (verdict.correct, verdict.reason) == (True, None)
    assert verdict.answer == canonical(gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "73"),
        ("18", "18,000"),
        ("18", "1.8"),
        ("\\frac13", "0.333"),
        ("(3,4)", "(4,3)"),
        ("(4,3)", "(7,2)"),
        ("x^2+1", "x^2-1"),
        ("\\text{Evelyn}", "Evan"),
        ("p - q", "q - p"),
        ("5", "5x"),
    ],
)
def test_other_answers_are_wrong(gold: str, answer: str):
    verdict = check_maths(maths(gold), boxed(answer))
    assert (verdict.correct, verdict.reason) == (False, "wrong answer")
    assert verdict.answer != canonical(gold)


@pytest.mark.parametrize(
    ("response", "gold", "answer"),
    [
        ("</think> so \\boxed{1} or rather \\boxed{\\frac{1}{2}}", "1", "\\frac{1}{2}"),
        ("<think>\\boxed{1}</think> The answer is \\boxed{2}.", "1", "2"),
        ("<think>\\boxed{1}</think> The total is $1,234.", "7", "1,234"),
        ("Between 10-20 it is 15, so -3.5.", "7", "-3.5"),
        ("from 10-20", "7", "20"),
        ("it is **42**.", "7", "42"),
        ("the root is 42", "\\pi", None),  # the last number is no answer where the gold is no number
        ("<think>it is \\boxed{1}", "1", None),  # thinking that never closes
        ("<think>a</think> b <think> \\boxed{1}", "1", None),
        ("</think> \\boxed{1} and \\boxed{2", "1", "1"),
        ("</think> nothing", "1", None),
        ("</think>", "1", None),
        ("", "1", None),
        ("</think> \\boxed{}", "1", None),
    ],
)
def test_the_answer_is_found(response: str, gold: str, answer: str | None):
    assert extract(response, gold) == answer


def test_braces_of_a_box_balance():
    assert last_boxed("\\boxed{\\{1, \\frac{2}{3}\\}} x") == "\\{1, \\frac{2}{3}\\}"


def test_no_answer_is_wrong_and_no_gold_is_neither():
    verdict = check_maths(maths("1"), "<think>\\boxed{1}")
    assert (verdict.correct, verdict.answer, verdict.reason) == (False, None, "no answer")
    verdict = check_maths(maths(None), boxed("\\frac{2}{4}"))
    assert (verdict.correct, verdict.answer) == (None, "1/2")


def test_equal_wrong_answers_vote_together():
    for spellings in (
        ["1/2", "0.5", "\\frac12", "\\tfrac{2}{4}", ".5"],
        ["\\frac{1}{\\sqrt2}", "\\frac{\\sqrt{2}}{2}", "\\sqrt2/2"],
        ["\\text{yes}", "yes", "\\textbf{Yes}."],
    ):
        assert len({check_maths(maths("99"), boxed(spelling)).answer for spelling in spellings}) == 1, spellings


def test_exact_answers_ignore_case_and_space_alone():
    item = maths("San  Marino")
    for right in ("san marino", "<think>x</think>\nIt is\nSan Marino", boxed("SAN MARINO")):
        assert check_exact(item, right).correct is True
    for wrong in ("San Marino!", "It is San Marino", "<think>San Marino", ""):
        assert check_exact(item, wrong).correct is False
    assert check_exact(replace(item, answer=None), "A").correct is None


def test_checking_works_in_threads():
    verdicts: list[bool | None] = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append(check_maths(maths(f"{i}\\pi"), boxed(f"\\pi {i}")).correct))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 6


def test_expressions_that_never_end_are_given_up_and_the_next_one_works():
    comparer = SymbolicComparer(timeout_sec=1.0)
    try:
        assert comparer.compare("1", "x" * 10_000) == (False, None)
        assert comparer.compare("10^{10^{10}} + 1", "10^{10^{10}} + 2") == (False, None)
        assert comparer.compare("\\frac{1}{2}", "0.5") == (True, "1/2")
    finally:
        comparer.close()


def test_the_models_text_is_never_evaluated(tmp_path: Path):
    target = tmp_path / "made"
    is_equivalent("\\pi", f'__import__("pathlib").Path("{target}").touch()')
    canonical(f'open("{target}","w")')
    assert not target.exists()


# reasoning-gym


def test_gym_tasks_are_fixed_by_the_seed_and_take_turns():
    suite = load_suite("reasoning_gym", 13, 3)
    assert suite.source.startswith("reasoning-gym 0.")
    assert suite.sha256 == load_suite("reasoning_gym", 13, 3).sha256 != load_suite("reasoning_gym", 13, 4).sha256
    assert sorted(Counter(item.category for item in suite.items).values()) == [2, 2, 2, 2, 2, 3]
    assert all(item.turns[0].endswith(DIRECTIVE) for item in suite.items)
    assert len({item.turns for item in suite.items}) == 13
    with pytest.raises(ValueError, match="takes no file"):
        load_suite("reasoning_gym=x.jsonl", 1, 0)


def test_gym_prompts_are_not_the_training_ones():
    import reasoning_gym

    suite = load_suite("reasoning_gym", 60, 0)
    for task in ("gsm_symbolic", "time_intervals"):
        training = reasoning_gym.create_dataset(task, size=200, seed=0)
        seen = {training[i]["question"].strip() for i in range(200)}
        mine = {item.turns[0].removesuffix(DIRECTIVE).strip() for item in suite.items if item.category == task}
        assert mine and not mine & seen


def test_gym_answers_are_judged_by_their_own_scorer():
    suite = load_suite("reasoning_gym", 24, 0)
    assert suite.check is not None
    for item in suite.items:
        assert suite.check(item, boxed(str(item.answer))).correct is True, item
        assert suite.check(item, boxed(f"\\text{{{item.answer}}}")).correct is True, item
        verdict = suite.check(item, boxed("123454321"))
        assert (verdict.correct, verdict.answer) == (False, "123454321")
        assert suite.check(item, "<think>").reason == "no answer"
