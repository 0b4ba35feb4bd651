"""Rows from traces, end to end on a tiny target: what is kept, what is dropped and why, and what the mask covers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from draft_training import prepare as prepare_module
from draft_training.prepare import prepare
from draft_training.row_store import load_rows
from draft_training.tokenizer import check_tokenizer
from specdec.config import RunConfig, TargetConfig, load_config
from specdec.conventions import traces_of
from specdec.rows import read_rows
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trace(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"t{i}",
        "problem": f"What is {i} and {i}?",
        "reasoning": f"twice {i}",
        "response": f"{2 * i}",
    } | changes


def config_for(target: Path, *overrides: str) -> RunConfig:
    return load_config(None, [f"target.name={target}", "traces.val_fraction=0.3", *overrides])


def all_rows(out: Path) -> dict[str, list[TokenRow]]:
    return {name: load_rows(out / name) for name in ("train", "val")}


def test_every_dropped_row_has_a_reason_and_an_example(target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    story = "a lighthouse keeper counts the ships that pass between noon and dusk on a foggy winter day"
    bench = write(tmp_path / "bench.jsonl", [{"question": f"{story}: how many?", "answer": "3"}])
    rows = [
        *[trace(i) for i in range(6)],
        trace(6, reasoning=None, response="<think>on and on"),
        trace(7, reasoning=None, response="<think>on and on and on"),
        trace(8, reasoning="long " * 300),
        trace(9, problem=f"Tell me: {story}, quickly"),
        trace(2, id="again"),
    ]
    path = write(tmp_path / "traces.jsonl", rows)
    config = config_for(target, f"traces.files={path}", f"traces.decontaminate=[{bench}]")
    card = prepare(config, tmp_path / "out")
    assert card["dropped"] == {
        "think tag never closes": {"rows": 2, "examples": ["t6", "t7"]},
        "longer than the target's context of 512 tokens": {"rows": 1, "examples": ["t8"]},
        f"overlaps with {bench}": {"rows": 1, "examples": ["t9"]},
        "near-duplicate of an earlier row": {"rows": 1, "examples": ["again"]},
    }
    assert card["splits"]["train"]["rows"] + card["splits"]["val"]["rows"] == 6
    assert card["benchmarks"] == {str(bench): 1}
    (line,) = [record.message for record in caplog.records if record.message.startswith("dropped")]
    assert line.startswith("dropped 5 of 11 rows: 2 think tag never closes (e.g. t6)") and "\n" not in line


def test_near_duplicate_prompts_are_on_one_side(target: Path, tmp_path: Path):
    story = "Eve has {} red marbles and as many blue ones, and she gives half of all her marbles to her brother Adam"
    rows = [
        trace(i, problem=prompt, reasoning=f"sample {i} {random.Random(i).random()}")
        for i, prompt in enumerate(f(story.format(n)) for n in range(8) for f in (str, str.upper, lambda t: f"{t}!"))
    ]
    config = config_for(target, f"traces.files={write(tmp_path / 'traces.jsonl', rows)}")
    prepare(config, tmp_path / "out")
    sides = {
        name: {row.prompt.upper().rstrip("!") for row in rows} for name, rows in all_rows(tmp_path / "out").items()
    }
    assert not sides["train"] & sides["val"] and len(sides["train"] | sides["val"]) == 8


def test_the_rows_of_a_folder_stop_at_max_rows(target: Path, tmp_path: Path):
    (tmp_path / "set").mkdir()
    for part in range(3):
        write(tmp_path / f"set/{part}.jsonl", [trace(10 * part + i) for i in range(5)])
    card = prepare(config_for(target, f"traces.files={tmp_path / 'set'}", "traces.max_rows=7"), tmp_path / "out")
    assert card["splits"]["train"]["rows"] + card["splits"]["val"]["rows"] == 7


@pytest.mark.parametrize("setting", ["files", "prompts"])
def test_the_target_answers_the_prompts_of_traces_and_of_prompt_files(
    target: Path, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
):
    def answer(target, traces, requests, log):
        assert traces.endpoints == ["http://a", "http://b"]
        with log.writing(len(requests)) as writer:
            for prompt, ids in requests.items():
                thinking = TOKENIZER(f"it says {prompt}\n</think>\n\nyes", add_special_tokens=False)["input_ids"]
                writer.add(prompt, ids, thinking, "stop")

    monkeypatch.setattr(prepare_module, "generate_over_http", answer)
    path = write(tmp_path / "traces.jsonl", [trace(i) for i in range(6)] + [trace(1)])
    overrides = [f"traces.{setting}={path}", "traces.endpoints=[http://a, http://b]"]
    overrides += ["traces.regenerate=true"] if setting == "files" else []
    card = prepare(config_for(target, *overrides), tmp_path / "out")
    assert card["on_policy"] is True
    assert card["dropped"] == {"near-duplicate of an earlier row": {"rows": 1, "examples": ["t1"]}}
    rows = [row for part in all_rows(tmp_path / "out").values() for row in part]
    assert len(rows) == 6
    for row in rows:
        assert TOKENIZER.decode(row.input_ids[slice(*row.think_span)]) == f"it says {row.prompt}\n</think>"


def test_a_row_without_anything_to_learn_is_refused_by_name(target: Path, tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [trace(0), trace(1, reasoning=" ", response="")])
    with pytest.raises(ValueError, match=r"t\.jsonl line 2: the completion is empty"):
        prepare(config_for(target, f"traces.files={path}"), tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(target: Path):
    resolved = resolve_target(TargetConfig(name=str(target)))
    check_tokenizer(TOKENIZER, resolved)
    resolved.config["vocab_size"] = len(TOKENIZER) - 1
    with pytest.raises(ValueError, match=f"ids up to {len(TOKENIZER) - 1}, but config.json says vocab_size"):
        check_tokenizer(TOKENIZER, resolved)


@pytest.mark.data
def test_the_mask_of_real_rows_covers_reasoning_and_response(target: Path, tmp_path: Path):
    """A few hundred real traces through prepare; 50 random rows decoded back to their texts."""
    source = Path(os.environ["SPECDEC_DATA_DIR"]) / "r1_traces.jsonl.gz"
    texts: dict[str, set[str]] = {}
    for _, item in read_rows(source):
        (found,) = traces_of(item)
        texts.setdefault(found.prompt, set()).add(f"{found.reasoning}\n</think>\n\n{found.response}<eos>")
    config = config_for(target, f"traces.files={source}", "traces.max_rows=200", "traces.max_length=100000")
    resolved_context = json.loads((target / "config.json").read_text()) | {"max_position_embeddings": 100_000}
    (target / "config.json").write_text(json.dumps(resolved_context))
    prepare(config, tmp_path / "out")
    rows = [row for part in all_rows(tmp_path / "out").values() for row in part]
    assert len(rows) == 200
    for row in random.Random(0).sample(rows, 50):
        masked = TOKENIZER.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if m])
        assert masked in texts[row.prompt]
        assert TOKENIZER.decode(row.input_ids[slice(*row.think_span)]).endswith("\n</think>")
        prompt = TOKENIZER.decode([t for t, m in zip(row.input_ids, row.loss_mask, strict=True) if not m])
        assert prompt == f"<bos><|User|>{row.prompt}<|Assistant|><think>\n"
