"""Text to ids: nothing of the reasoning is lost, the mask covers the completion, bad lines are named."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from specdec.traces import ReasoningTrace, prompt_ids, read_prompts, read_traces, row_from_ids, tokenize_trace
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


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: want a JSON object"),
        ('{"problem": "x"}', "line 2: needs a prompt"),
        ('{"problem": "x", "response": "<think> never closed"}', "line 2: <think> never closes"),
        ('{"problem": "x", "reasoning": " ", "response": ""}', "line 2: the completion is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line, complaint):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"problem": "a", "reasoning": "b", "response": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        list(read_traces(path))


def test_empty_and_missing_files_are_refused(tmp_path: Path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match="is empty"):
        list(read_traces(empty))
    with pytest.raises(ValueError, match="does not exist"):
        list(read_traces(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(empty)


def test_tags_inside_the_response_are_taken_apart(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"prompt": "p", "response": "<think>\nwhy\n</think>\n\nbecause"}) + "\n")
    assert list(read_traces(path)) == [ReasoningTrace(prompt="p", reasoning="why", response="because")]


@pytest.mark.data
def test_real_r1_traces_survive_decoding(tmp_path: Path):
    with gzip.open(Path(os.environ["SPECDEC_DATA_DIR"]) / "r1_traces.jsonl.gz", "rt") as file:
        lines = file.readlines()
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(random.Random(0).sample(lines, 50)))
    for trace in read_traces(path):
        row = tokenize_trace(TOKENIZER, trace)
        completion = TOKENIZER.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m])
        assert completion == f"{trace.reasoning}\n</think>\n\n{trace.response}<eos>"
        assert trace.reasoning in span_text(row, row.think_span)
