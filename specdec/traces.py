"""Where text becomes token ids: reasoning traces, the chat template, think/answer spans and the loss mask.

A row is the generation prompt's ids followed by the completion's own ids. Rendering a whole conversation
through an R1 chat template instead would delete the reasoning: those templates keep only what follows
``</think>`` of an assistant turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec import r1
from specdec.record import text_sha256

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
PROMPT_FIELDS = ("problem", "question", "prompt", "instruction")
REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")
RESPONSE_FIELDS = ("response", "solution", "output", "answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningTrace:
    """One conversation as text. ``reasoning`` is empty for a model that doesn't think in tags."""

    prompt: str
    reasoning: str
    response: str

    @property
    def conversation_id(self) -> str:
        """Traces of one prompt share it, so that a split never separates them."""
        return text_sha256(self.prompt)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """One conversation as ids. Spans are half-open token ranges of ``input_ids``."""

    conversation_id: str
    prompt: str
    input_ids: list[int]
    prompt_span: tuple[int, int]
    think_span: tuple[int, int]
    answer_span: tuple[int, int]
    loss_mask: list[int] = field(default_factory=list)  # 1 on the completion

    @property
    def num_completion_tokens(self) -> int:
        return len(self.input_ids) - self.prompt_span[1]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object), blank lines skipped.

    Raises:
        ValueError: missing or empty file, or a line that is no JSON object; the line number is in the message.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a JSON Lines file")
    found = False
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not JSON ({error.msg}); fix or remove the line") from error
            if not isinstance(item, dict):
                raise ValueError(f"{path} line {number}: want a JSON object, got {type(item).__name__}")
            found = True
            yield number, item
    if not found:
        raise ValueError(f"{path} is empty; it needs one JSON object a line")


def _first_text(item: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((item[name] for name in names if isinstance(item.get(name), str)), None)


def read_traces(path: Path) -> Iterator[ReasoningTrace]:
    """Read existing traces: ``problem``/``reasoning``/``response`` and their usual synonyms.

    Raises:
        ValueError: a line without prompt or response, or whose think tag never closes, by line number.
    """
    for number, item in read_jsonl(path):
        prompt = _first_text(item, PROMPT_FIELDS)
        reasoning = _first_text(item, REASONING_FIELDS)
        response = _first_text(item, RESPONSE_FIELDS)
        if not prompt or response is None:
            raise ValueError(
                f"{path} line {number}: needs a prompt ({'/'.join(PROMPT_FIELDS)}) and a response "
                f"({'/'.join(RESPONSE_FIELDS)}), has {sorted(item)}"
            )
        if reasoning is None and THINK_OPEN in response:
            body, close, response = response.partition(THINK_CLOSE)
            if not close:
                raise ValueError(f"{path} line {number}: {THINK_OPEN} never closes; drop or complete this trace")
            reasoning = body.partition(THINK_OPEN)[2]
        if not (reasoning or response).strip():
            raise ValueError(f"{path} line {number}: the completion is empty")
        yield ReasoningTrace(prompt=prompt, reasoning=(reasoning or "").strip(), response=response.strip())


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSONL file (``prompt`` or a synonym a line) or of a text file (one a line).

    Raises:
        ValueError: empty file, or a malformed line by number.
    """
    if path.suffix == ".jsonl":
        prompts = []
        for number, item in read_jsonl(path):
            prompt = _first_text(item, PROMPT_FIELDS)
            if not prompt or not prompt.strip():
                raise ValueError(f"{path} line {number}: no prompt; want one of {', '.join(PROMPT_FIELDS)}")
            prompts.append(prompt)
        return prompts
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a .jsonl or a text file of prompts")
    prompts = [line.strip() for line in path.read_text().split("\n") if line.strip()]  # U+2028 may be in one
    if not prompts:
        raise ValueError(f"{path} is empty; it needs one prompt a line")
    return prompts


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """The generation prompt of one user turn: what ``/v1/chat/completions`` feeds the target.

    R1-Distill targets are rendered with the template that they are served with, whatever revision they carry.
    """
    own = tokenizer.chat_template
    template = r1.template() if isinstance(own, str) and r1.has_r1_turns(own) else None
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=template, tokenize=False, add_generation_prompt=True
    )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of the generation prompt; special tokens come from the template alone."""
    return tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def tokenize_trace(tokenizer: Any, trace: ReasoningTrace) -> TokenRow:
    """Ids and spans of a trace given as text (off-policy unless the target wrote it)."""
    rendered = render_prompt(tokenizer, trace.prompt)
    prefix = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    thinking = ""
    if trace.reasoning:
        opened = rendered.rstrip().endswith(THINK_OPEN)  # R1 templates open the tag themselves
        newline = "" if opened and rendered.endswith("\n") else "\n"
        thinking = f"{'' if opened else THINK_OPEN}{newline}{trace.reasoning}\n{THINK_CLOSE}"
    answer = f"\n\n{trace.response}" if thinking else trace.response
    encoded = tokenizer(thinking + answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    num_think = next((i for i, (start, _) in enumerate(offsets) if start >= len(thinking)), len(ids)) if thinking else 0
    return _row(trace.prompt, prefix, [*ids, tokenizer.eos_token_id], num_think)


def row_from_ids(tokenizer: Any, prompt: str, prefix: list[int], completion: list[int]) -> TokenRow:
    """A row from the target's own tokens, exactly as it produced them."""
    return _row(prompt, prefix, completion, _num_think_tokens(tokenizer, completion))


def _num_think_tokens(tokenizer: Any, completion: list[int]) -> int:
    """Number of leading tokens up to and including ``</think>``; 0 when the completion has none."""
    close_id = tokenizer.convert_tokens_to_ids(THINK_CLOSE)
    if close_id is not None and close_id != tokenizer.unk_token_id:
        return completion.index(close_id) + 1 if close_id in completion else 0
    if THINK_CLOSE not in tokenizer.decode(completion):
        return 0
    low, high = 1, len(completion)
    while low < high:  # the shortest prefix that shows the tag
        middle = (low + high) // 2
        low, high = (low, middle) if THINK_CLOSE in tokenizer.decode(completion[:middle]) else (middle + 1, high)
    return low


def _row(prompt: str, prefix: list[int], completion: list[int], num_think: int) -> TokenRow:
    start, end = len(prefix), len(prefix) + len(completion)
    return TokenRow(
        conversation_id=text_sha256(prompt),
        prompt=prompt,
        input_ids=[*prefix, *completion],
        prompt_span=(0, start),
        think_span=(start, start + num_think),
        answer_span=(start + num_think, end),
        loss_mask=[0] * start + [1] * (end - start),
    )
