"""Text to ids: nothing of the reasoning is lost, the mask covers the completion."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from specdec.conventions import traces_of
from specdec.rows import read_rows
from specdec.traces import ReasoningTrace, prompt_ids, row_from_ids, tokenize_trace
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def span_text(row, span):
    return TOKENIZER.decode(row.input_ids[slice(*span)])


def test_the_template_would_have_deleted_the_reasoning_and_the_row_keeps_it():
    trace = ReasoningTrace(prompt="2+2?", reasoning="Two and two.", response="4")
    reply = "<think>\nTwo and two.\n</think>\n\n4"
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": reply}]
    assert "Two and two" not in TOKENIZER.apply_chat_template(messages, tokenize=False)
    row = tokenize_trace(TOKENIZER, trace)
    assert span_text(row, row.prompt_span) == "<bos><|User|>2+2?<|Assistant|><think>\n"
    assert span_text(row, row.think_span) == "Two and two.\n</think>"
    assert span_text(row, row.answer_span) == "\n\n4<eos>"
    assert TOKENIZER.decode(row.input_ids).count("<think>") == 1


def test_mask_and_spans_partition_the_row():
    row = tokenize_trace(TOKENIZER, ReasoningTrace(prompt="Hi", reasoning="Hm.", response="Hello"))
    start, end = row.prompt_span[1], len(row.input_ids)
    assert row.loss_mask == [0] * start + [1] * (end - start)
    assert (row.prompt_span[0], row.think_span[0], row.answer_span[0]) == (0, row.prompt_span[1], row.think_span[1])
    assert row.answer_span[1] == end


def test_a_completion_without_tags_is_all_answer():
    row = tokenize_trace(TOKENIZER, ReasoningTrace(prompt="Hi", reasoning="", response="Hello"))
    assert row.think_span[0] == row.think_span[1]
    assert span_text(row, row.answer_span) == "Hello<eos>"


def test_rows_from_ids_keep_the_ids_and_find_the_end_of_thinking():
    prefix = prompt_ids(TOKENIZER, "Hi")
    completion = TOKENIZER("Hm.\n</think>\n\nHello", add_special_tokens=False)["input_ids"]
    row = row_from_ids(TOKENIZER, "Hi", prefix, completion)
    assert row.input_ids == prefix + completion
    assert span_text(row, row.think_span) == "Hm.\n</think>"


def test_a_completion_cut_while_thinking_is_all_thinking():
    prefix = prompt_ids(TOKENIZER, "Hi")
    cut = TOKENIZER("Hm, let me", add_special_tokens=False)["input_ids"]
    row = row_from_ids(TOKENIZER, "Hi", prefix, cut)
    assert row.think_span == (len(prefix), len(row.input_ids)) and row.answer_span[0] == row.answer_span[1]


def test_reasoning_that_the_ids_lost_and_an_empty_mask_are_refused():
    class Forgetful:
        """A tokenizer whose vocabulary has no digits: they become nothing."""

        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def __call__(self, text, **options):
            return TOKENIZER("".join(c for c in text if not c.isdigit()), **options)

    with pytest.raises(ValueError, match="the reasoning vanished"):
        tokenize_trace(Forgetful(), ReasoningTrace(prompt="Hi", reasoning="1 and 2", response="3"))
    with pytest.raises(ValueError, match="nothing would be learnt"):
        tokenize_trace(TOKENIZER, ReasoningTrace(prompt="Hi", reasoning="", response=""))


@pytest.mark.data
def test_real_r1_traces_survive_decoding():
    rows = list(read_rows(Path(os.environ["SPECDEC_DATA_DIR"]) / "r1_traces.jsonl.gz"))
    for _, item in random.Random(0).sample(rows, 50):
        (trace,) = traces_of(item)
        assert (trace.prompt, trace.reasoning) == (item["problem"], item["reasoning"].strip())
        row = tokenize_trace(TOKENIZER, trace)
        completion = TOKENIZER.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m])
        assert completion == f"{trace.reasoning}\n</think>\n\n{trace.response}<eos>"
        assert trace.reasoning in span_text(row, row.think_span)
