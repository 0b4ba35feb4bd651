"""Checks answers of maths: extracts the last boxed expression, compares numbers itself and the rest by math-verify."""

from __future__ import annotations

import re
from fractions import Fraction

from specdec.evaluation.suites.base import Item, Verdict, answer_text
from specdec.evaluation.suites.equivalence import compare

MAX_CHARS = 400  # of a vote
NUMBER = re.compile(r"(?<![\w)])-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+|\d+(?:\.\d+)?")
PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
RATIO = re.compile(r"([-+]?)(?:\\frac\{([-+]?[\d.]+)\}\{([-+]?[\d.]+)\}|([\d.]+)/([\d.]+))")
WORDS = re.compile(r"[A-Za-z]{3,}(?:[\s-]+[A-Za-z]+)*")  # no product of variables
MAX_NUMBER_CHARS = 60
UNITS = re.compile(r"([-+]?[\d.,]*\d)(?:\s+[A-Za-z]{3,})+")  # a number and words: 18 dollars


def check_maths(item: Item, response: str) -> Verdict:
    """Judge a response against ``item.answer``.

    ``Verdict.answer`` is canonical, so that 1/2, \\frac12 and 0.5 vote together; a correct one is spelled as the gold.
    """
    answer = extract(response, item.answer)
    if item.answer is None:
        return Verdict(correct=None, answer=None if answer is None else canonical(answer))
    if answer is None:
        return Verdict(correct=False, answer=None, reason="no answer")
    if is_equivalent(item.answer, answer):
        return Verdict(correct=True, answer=canonical(item.answer))
    return Verdict(correct=False, answer=canonical(answer), reason="wrong answer")


def check_exact(item: Item, response: str) -> Verdict:
    """Judge by equality of text, case and white space aside: of the boxed answer, the whole answer or its last line."""
    text = answer_text(response)
    boxed = None if text is None else last_boxed(text)
    forms = [boxed] if boxed is not None else [text, *text.splitlines()[-1:]] if text else []
    folded = [" ".join(form.split()).casefold() for form in forms if form is not None and form.strip()]
    answer = folded[-1] if folded else None
    if item.answer is None:
        return Verdict(correct=None, answer=answer)
    gold = " ".join(item.answer.split()).casefold()
    if answer is None:
        return Verdict(correct=False, answer=None, reason="no answer")
    correct = gold in folded
    return Verdict(correct=correct, answer=gold if correct else answer, reason=None if correct else "wrong answer")


def extract(response: str, gold: str | None) -> str | None:
    """The last box after the thinking; without one, where ``gold`` is a plain number, the last number."""
    text = answer_text(response)
    if text is None:
        return None
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if gold is not None and PLAIN.fullmatch(gold.strip().replace(",", "")):
        numbers = NUMBER.findall(text)
        return numbers[-1] if numbers else None
    return None


def last_boxed(text: str) -> str | None:
    """The content of the last complete \\boxed{...} or \\fbox{...}, braces balanced; None without one."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth, position = 1, match.end()
        while position < len(text) and depth:
            if text[position] == "\\":
                position += 1  # what follows a backslash is no brace of the grouping
            elif text[position] in "{}":
                depth += 1 if text[position] == "{" else -1
            position += 1
        if depth == 0:
            return text[match.end() : position - 1]
    return None


def strip_text(answer: str) -> str:
    """Without the wrappers that only set type: text commands, math signs, spaces, sizes."""
    answer = answer.strip().strip("$").strip()
    answer = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]\s*|\\q?quad\b|~", "", answer)
    answer = answer.replace("\\ ", " ").replace("\\$", "$").replace("\\%", "%").replace("−", "-")
    return answer.strip().strip("$").strip().removesuffix(".").strip()


def number_of(answer: str) -> Fraction | None:
    """The rational number that an answer plainly is (decimal, thousands, \\frac or a/b); None when it is not one."""
    text = re.sub(r"\\[dt]frac", r"\\frac", strip_text(answer))
    text = re.sub(r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\{([^{}]*)\}(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if match := UNITS.fullmatch(text):
        text = match.group(1)
    text = text.replace("{,}", ",").replace(" ", "") if ", " not in text else text
    if re.fullmatch(r"[-+$]*\d{1,3}(?:,\d{3})+(?:\.\d*)?", text):
        text = text.replace(",", "")
    try:
        if PLAIN.fullmatch(text):
            return Fraction(text)
        if match := RATIO.fullmatch(text):
            sign, top, bottom, left, right = match.groups()
            return (-1 if sign == "-" else 1) * Fraction(top or left) / Fraction(bottom or right)
    except (ValueError, ZeroDivisionError):
        return None
    return None


def canonical(answer: str) -> str:
    """One spelling for equal answers, as far as numbers and what math-verify parses go; else tidied text."""
    number = number_of(answer)
    if number is not None:
        return str(number)
    if WORDS.fullmatch(strip_text(answer)):
        return tidied(answer).casefold()
    _, spelled = compare(None, answer)
    return tidied(answer) if spelled is None else spelled[:MAX_CHARS]


def is_equivalent(gold: str, answer: str) -> bool:
    """Whether an answer equals the gold one mathematically. What sympy can't compare in time is compared as text."""
    mine, theirs = number_of(gold), number_of(answer)
    if mine is not None and theirs is not None:
        return mine == theirs
    if WORDS.fullmatch(strip_text(gold)) and WORDS.fullmatch(strip_text(answer)):
        return tidied(gold).casefold() == tidied(answer).casefold()
    return tidied(gold) == tidied(answer) or compare(gold, answer)[0]


def tidied(answer: str) -> str:
    """Equal for answers that differ in typesetting alone."""
    text = re.sub(r"\\[dt]frac", r"\\frac", strip_text(answer))
    return re.sub(r"\s+", "", text)[:MAX_CHARS]
