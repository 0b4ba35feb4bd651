"""Each public convention on a literal row: the right prompt, reasoning and response, or a reason to drop the row."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.conventions import UnusableRowError, convention_of, prompt_of, traces_of
from specdec.traces import ReasoningTrace

OPENR1 = {
    "problem": "1+1?", "solution": "short", "answer": "2", "source": "olympiads", "uuid": "u-1",
    "is_reasoning_complete": [True, False, True, True],
    "generations": [
        "<think>\nThree?\n</think>\n\n\\boxed{3}",
        "<think>\nTwo, I",
        "<think>\nTwo.\n</think>\n\n\\boxed{2}",
        "<think>\nOne and one.\n</think>\n\n\\boxed{2}",
    ],
    "correctness_math_verify": [False, True, True, True], "correctness_llama": None, "correctness_count": 3,
    "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>x</think>y"}],
}  # fmt: skip
OPENTHOUGHTS = {
    "system": "Structure your response: <|begin_of_thought|> {thoughts} <|end_of_thought|> and so on.",
    "conversations": [
        {"from": "user", "value": "1+1?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nTwo.\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\n\\boxed{2}\n\n<|end_of_solution|>",
        },
    ],
}
LITERAL = {
    "OpenR1-Math-220k": OPENR1,
    "OpenThoughts-114k": OPENTHOUGHTS,
    "OpenThoughts-114k metadata": {
        "problem": "1+1?", "deepseek_reasoning": "Two.", "deepseek_solution": "\\boxed{2}",
        "ground_truth_solution": "2",
        "domain": "math", "source": "numina", "test_cases": None, "starter_code": None,
    },
    "Mixture-of-Thoughts": {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\\boxed{2}"},
        ],
        "num_tokens": 9, "source": "math",
    },
    "s1K-1.1": {
        "question": "1+1?", "solution": "2", "cot_type": "math", "source_type": "aime", "metadata": "{}",
        "gemini_thinking_trajectory": "no", "gemini_attempt": "no", "deepseek_thinking_trajectory": "Two.\n",
        "deepseek_attempt": "\\boxed{2}", "gemini_grade": "Yes", "deepseek_grade": "Yes",
    },
    "LIMO": {"question": "1+1?", "solution": "Two.", "answer": 2},
    "AM-DeepSeek-R1-Distilled": {
        "messages": [
            {
                "role": "user", "content": "1+1?",
                "info": {"source": "s", "reference_answer": "2", "think_content": None, "answer_content": None},
            },
            {
                "role": "assistant", "content": "<think>Two.</think><answer>\\boxed{2}</answer>",
                "info": {"source": None, "think_content": "Two.", "answer_content": "\\boxed{2}"},
            },
        ],
    },
    "an API's messages": {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "reasoning_content": "Two.", "content": "\\boxed{2}"},
        ],
    },
    "a raw R1 completion": {"prompt": "1+1?", "response": "Two.\n</think>\n\n\\boxed{2}"},
    "tags in the response": {"instruction": "1+1?", "output": "<think>\nTwo.\n</think>\n\n\\boxed{2}"},
    "our own": {"problem": "1+1?", "reasoning": "Two.", "response": "\\boxed{2}"},
    "the shared data's": {
        "id": "r1_traces-1", "source": "o/r:p", "license": "MIT", "model": "DeepSeek-R1", "problem": "1+1?",
        "reasoning": "Two.", "response": "\\boxed{2}", "answer": "2", "domain": "maths", "overlap": [], "commit": "c",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LITERAL)
def test_a_literal_row_is_understood(name: str):
    assert prompt_of(LITERAL[name]) == "1+1?"
    assert traces_of(LITERAL[name]) == [ReasoningTrace(prompt="1+1?", reasoning="Two.", response="\\boxed{2}")]


def test_more_of_the_correct_generations_on_demand():
    assert [trace.reasoning for trace in traces_of(OPENR1, 8)] == ["Two.", "One and one."]
    judged = OPENR1 | {"correctness_math_verify": [False] * 4, "correctness_llama": [False, False, False, True]}
    assert [trace.reasoning for trace in traces_of(judged, 8)] == ["One and one."]
    unmarked = OPENR1 | {"correctness_math_verify": None, "is_reasoning_complete": None}
    assert [trace.reasoning for trace in traces_of(unmarked, 8)] == ["Three?", "Two.", "One and one."]


def chat(*contents: str, **row: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)], **row}


def test_a_reply_without_tags_has_no_reasoning_and_a_system_prompt_joins_the_question():
    row = chat("Hi", "Hello")
    assert traces_of(row) == [ReasoningTrace(prompt="Hi", reasoning="", response="Hello")]
    row["messages"].insert(0, {"role": "system", "content": "Be kind."})
    assert traces_of(row)[0].prompt == "Be kind.\n\nHi"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": "<think> and on"}, "think tag never closes"),
        ({"prompt": "a", "response": "<|begin_of_thought|> and on"}, "think tag never closes"),
        ({"prompt": "a", "response": "<|begin_of_thought|>x<|end_of_thought|><|begin_of_solution|>y"}, "solution tag"),
        ({"prompt": "a", "response": "Sure. <think>x</think>y"}, "text before the think tag"),
        ({"prompt": "a", "response": "<think>x</think>y<think>z</think>"}, "more than one think tag"),
        ({"prompt": "a", "reasoning": "x", "response": "<think>x</think>y"}, "more than one think tag"),
        (OPENR1 | {"correctness_math_verify": [False] * 4}, "no complete generation is marked correct"),
        (chat("a", "b", "c", "d"), "not one question and one reply"),
        (chat("a"), "not one question and one reply"),
    ],
)
def test_understood_but_unusable_rows_have_a_reason(row: dict[str, Any], reason: str):
    with pytest.raises(UnusableRowError, match=reason):
        traces_of(row)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"problem": "x"}, "needs a prompt .* has problem"),
        ({"text": "x"}, "OpenR1-Math, .*; has text"),
        ({"problem": "x", "reasoning": " ", "response": ""}, "the completion is empty"),
        ({"problem": "x", "response": ["y"]}, "reply is no text"),
    ],
)
def test_rows_of_no_convention_are_refused(row: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        traces_of(row)


def test_prompts_alone():
    assert prompt_of({"turns": ["first", "second"]}) == "first"
    assert prompt_of({"question": "q"}) == "q"
    assert prompt_of(chat("asked")) == "asked"
    assert prompt_of({"prompt": 3}) is None and prompt_of({"prompt": " "}) is None
    assert convention_of({"question": "q"}) is None
