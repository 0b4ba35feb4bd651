"""How public sets of reasoning traces name their fields: one table, tried in order for each row.

Adding a convention is adding a line to ``CONVENTIONS``. The schemas are those of the sets' cards on Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from specdec.rows import Row
from specdec.traces import THINK_CLOSE, THINK_OPEN, ReasoningTrace

PROMPT_FIELDS = ("problem", "question", "prompt", "instruction", "Problem", "Question")
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")
RESPONSE_FIELDS = ("response", "solution", "output", "answer")
ID_FIELDS = ("id", "task_id", "unique_id", "question_id", "prompt_id", "ID", "uuid")
THINK_TAGS = ((THINK_OPEN, THINK_CLOSE), ("<|begin_of_thought|>", "<|end_of_thought|>"))
SOLUTION_OPEN, SOLUTION_CLOSE = "<|begin_of_solution|>", "<|end_of_solution|>"
USER_ROLES, REPLY_ROLES = ("user", "human"), ("assistant", "gpt")
UNCLOSED = "think tag never closes"

Completion = tuple[str, str]  # reasoning without tags, response
Text = Callable[[Row], str | None]


class UnusableRowError(Exception):
    """A row that is understood but no trace to learn from; the message is the reason it is counted under."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """One way to write a trace. A row follows it when it has one of each group of ``fields``."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    prompt: Text
    completions: Callable[[Row], Iterator[Completion]]

    def fits(self, row: Row) -> bool:
        return all(any(row.get(name) not in (None, []) for name in group) for group in self.fields)


def first(row: Row, names: tuple[str, ...]) -> Any:
    """The first of the fields that the row has and that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def row_id(row: Row, where: str) -> str:
    """The row's own id, else its place."""
    found = first(row, ID_FIELDS)
    return where if found is None else str(found)


def split_thinking(text: str) -> Completion:
    """A reply's reasoning and response, tags removed. The opening tag may be missing: R1's prompt holds it.

    Raises:
        UnusableRowError: a tag never closes, comes twice or comes late.
    """
    reasoning, response = "", text
    for opening, closing in THINK_TAGS:
        if opening not in text and closing not in text:
            continue
        before, opened, inside = text.partition(opening)
        if not opened or closing in before:
            before, inside = "", text
        if before.strip():
            raise UnusableRowError("text before the think tag")
        reasoning, closed, response = inside.partition(closing)
        if not closed:
            raise UnusableRowError(UNCLOSED)
        break
    if SOLUTION_OPEN in response:
        response, closed, _ = response.partition(SOLUTION_OPEN)[2].partition(SOLUTION_CLOSE)
        if not closed:
            raise UnusableRowError("solution tag never closes")
    return reasoning.strip(), response.strip()


def _text(*names: str) -> Text:
    return lambda row: value if isinstance(value := first(row, names), str) else None


def _pair(reasoning: tuple[str, ...], response: tuple[str, ...]) -> Callable[[Row], Iterator[Completion]]:
    """Reasoning in a field of its own, or else inside the response."""

    def completions(row: Row) -> Iterator[Completion]:
        thinking, reply = first(row, reasoning), first(row, response)
        if not isinstance(reply, str):
            return
        if isinstance(thinking, str):
            yield thinking.strip(), reply.strip()
        else:
            yield split_thinking(reply)

    return completions


def _boxed_solution(row: Row) -> Iterator[Completion]:
    """LIMO: the solution is one long chain of thought, the answer a bare value."""
    yield str(row["solution"]).strip(), f"\\boxed{{{row['answer']}}}"


def _correct_generations(row: Row) -> Iterator[Completion]:
    """OpenR1: several samples, each with marks; complete ones that a checker accepted, or all where none looked."""
    marks = [row.get("correctness_math_verify") or [], row.get("correctness_llama") or []]
    samples = zip_longest(row["generations"], row.get("is_reasoning_complete") or [], *marks)
    chosen = [
        text
        for text, complete, *correct in samples
        if text and complete is not False and (any(correct) or not any(marks))
    ]
    if not chosen:
        raise UnusableRowError("no complete generation is marked correct")
    yield from _usable(map(split_thinking, chosen))


def _usable(completions: Iterator[Completion]) -> Iterator[Completion]:
    """Those that can be split; the first refusal only when there are no others."""
    refusal, found = None, False
    while True:
        try:
            completion = next(completions)
        except StopIteration:
            break
        except UnusableRowError as error:
            refusal = refusal or error
            continue
        found = True
        yield completion
    if refusal is not None and not found:
        raise refusal


def _turns(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """(role, message) of ``messages`` (role/content) or ``conversations`` (from/value)."""
    messages = first(row, ("messages", "conversations"))
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return []
    return [(str(first(message, ("role", "from"))), message) for message in messages]


def _asked(row: Row) -> str | None:
    """The first user turn; a system prompt in front, as R1 wants it, unless it only explains foreign think tags."""
    turns = _turns(row)
    asked = next((first(message, ("content", "value")) for role, message in turns if role in USER_ROLES), None)
    told = [first(message, ("content", "value")) for role, message in turns if role == "system"]
    system = next((text for text in (row.get("system"), *told) if isinstance(text, str) and text.strip()), "")
    if not isinstance(asked, str) or not system or THINK_TAGS[1][0] in system:
        return asked if isinstance(asked, str) else None
    return f"{system.strip()}\n\n{asked}"


def _replied(row: Row) -> Iterator[Completion]:
    """The reply: AM's ``info`` with both parts, an API's ``reasoning_content``, or tags inside the text."""
    turns = _turns(row)
    replies = [message for role, message in turns if role in REPLY_ROLES]
    if len(replies) != 1 or sum(role in USER_ROLES for role, _ in turns) != 1:
        raise UnusableRowError("not one question and one reply")
    reply = replies[0]
    info = reply.get("info") or {}
    if info.get("think_content"):
        yield from _pair(("think_content",), ("answer_content",))(info)
    else:
        yield from _pair(REASONING_FIELDS, ("content", "value"))(reply)


CONVENTIONS = (
    Convention(
        name="OpenR1-Math",
        fields=(("problem",), ("generations",)),
        prompt=_text("problem"),
        completions=_correct_generations,
    ),
    Convention(
        name="s1K-1.1",
        fields=(("question",), ("deepseek_thinking_trajectory",), ("deepseek_attempt",)),
        prompt=_text("question"),
        completions=_pair(("deepseek_thinking_trajectory",), ("deepseek_attempt",)),
    ),
    Convention(
        name="OpenThoughts metadata",
        fields=(("problem",), ("deepseek_reasoning",), ("deepseek_solution",)),
        prompt=_text("problem"),
        completions=_pair(("deepseek_reasoning",), ("deepseek_solution",)),
    ),
    Convention(  # Mixture-of-Thoughts, OpenThoughts, AM-DeepSeek-R1-Distilled, and chats in general
        name="messages",
        fields=(("messages", "conversations"),),
        prompt=_asked,
        completions=_replied,
    ),
    Convention(
        name="prompt, reasoning and response",
        fields=(PROMPT_FIELDS, REASONING_FIELDS, RESPONSE_FIELDS),
        prompt=_text(*PROMPT_FIELDS),
        completions=_pair(REASONING_FIELDS, RESPONSE_FIELDS),
    ),
    Convention(
        name="LIMO",
        fields=(("question",), ("solution",), ("answer",)),
        prompt=_text("question"),
        completions=_boxed_solution,
    ),
    Convention(
        name="prompt and response",
        fields=(PROMPT_FIELDS, RESPONSE_FIELDS),
        prompt=_text(*PROMPT_FIELDS),
        completions=_pair(REASONING_FIELDS, RESPONSE_FIELDS),
    ),
)


def convention_of(row: Row) -> Convention | None:
    """The first convention that the row follows."""
    return next((convention for convention in CONVENTIONS if convention.fits(row)), None)


def prompt_of(row: Row) -> str | None:
    """What the row asks, under any convention, or in a field of its own; None when it asks nothing."""
    asked = (convention.prompt(row) for convention in CONVENTIONS)
    turns = row.get("turns")
    spoken = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], str) else None
    return next((text for text in (*asked, spoken) if text and text.strip()), None)


def traces_of(row: Row, max_generations: int = 1) -> list[ReasoningTrace]:
    """The row's traces, at most ``max_generations`` of one that holds several.

    Raises:
        UnusableRowError: understood, but to be dropped and counted.
        ValueError: no convention fits, or the completion is empty.
    """
    convention = convention_of(row)
    prompt = convention.prompt(row) if convention else None
    if convention is None or not prompt or not prompt.strip():
        raise ValueError(
            f"needs a prompt ({'/'.join(PROMPT_FIELDS[:4])}) and a response ({'/'.join(RESPONSE_FIELDS)}), "
            f"or one of {', '.join(known.name for known in CONVENTIONS)}; has {', '.join(sorted(map(str, row)))}"
        )
    traces = []
    for reasoning, response in convention.completions(row):
        if not (reasoning or response):
            raise ValueError("the completion is empty")
        if any(tag in part for tags in THINK_TAGS for tag in tags for part in (reasoning, response)):
            raise UnusableRowError("more than one think tag")
        traces.append(ReasoningTrace(prompt=prompt, reasoning=reasoning, response=response))
        if len(traces) == max_generations:
            break
    if not traces:
        raise ValueError(f"follows {convention.name}, but its reply is no text")
    return traces
