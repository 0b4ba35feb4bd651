"""Where text becomes token ids: reasoning traces, the chat template, think/answer spans and the loss mask.

A row is the generation prompt's ids followed by the completion's own ids. Rendering a whole conversation
through an R1 chat template instead would delete the reasoning: those templates keep only what follows
``</think>`` of an assistant turn.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

from specdec import r1
from specdec.record import text_sha256

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


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
    """Ids and spans of a trace given as text (off-policy unless the target wrote it).

    Raises:
        ValueError: nothing to learn from, or the reasoning is not in the ids that were made of it.
    """
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
    if not ids:
        raise ValueError("the completion is empty: nothing would be learnt from it")
    if _squeezed(trace.reasoning) not in _squeezed(tokenizer.decode(ids[:num_think])):
        raise ValueError("the reasoning vanished: decoding its tokens does not give its text back")
    return _row(trace.prompt, prefix, [*ids, tokenizer.eos_token_id], num_think)


def _squeezed(text: str) -> str:
    """Without white space and typographic variants, which tokenizers may normalise."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def row_from_ids(tokenizer: Any, prompt: str, prefix: list[int], completion: list[int]) -> TokenRow:
    """A row from the target's own tokens, exactly as it produced them.

    A completion that was cut while it was still thinking is all thinking.
    """
    num_think = _num_think_tokens(tokenizer, completion)
    if not num_think and _still_thinking(tokenizer, prefix, completion):
        num_think = len(completion)
    return _row(prompt, prefix, completion, num_think)


def _still_thinking(tokenizer: Any, prefix: list[int], completion: list[int]) -> bool:
    """Whether a think tag is open that the completion does not close."""
    opened_before = tokenizer.decode(prefix[-8:]).rstrip().endswith(THINK_OPEN)
    return opened_before or tokenizer.decode(completion[:16]).lstrip().startswith(THINK_OPEN)


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
