"""Suites: what loads, what is refused with which advice, what the prompts say, and who judges right."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.evaluation.suites import Item, Suite, load_suite, looks_like_random_tokens, suite_names

BENCH_SUITES = ("gsm8k", "math500", "aime24", "humaneval", "mt_bench", "spec_bench")
DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def bench(name: str, num_items: int | None = None, seed: int = 0) -> Suite:
    """The suite as it lies in the data folder; a file that the folder lacks skips the test."""
    folder = Path(os.environ["SPECDEC_DATA_DIR"])
    if not list((folder / "bench").glob(f"{name}*")):
        pytest.skip(f"the data folder has no {name}")
    return load_suite(name, num_items, seed)


def maths(answer: str | None) -> Item:
    return Item(suite="s", id="1", turns=("?",), answer=answer)


def boxed(answer: str) -> str:
    return f"<think>\nmaybe \\boxed{{0}}\n</think>\n\nThe answer is $\\boxed{{{answer}}}$."


# The files of the data folder


@pytest.mark.data
@pytest.mark.parametrize("name", BENCH_SUITES)
def test_each_bench_file_loads(name: str):
    suite = bench(name)
    assert suite.name == name
    assert len(suite.items) >= 30
    assert all(item.suite == name and item.turns and all(item.turns) for item in suite.items)
    assert (suite.check is None) == (name in ("mt_bench", "spec_bench"))
    assert suite.source.endswith((".jsonl", ".jsonl.gz"))
    again = load_suite(f"{name}={suite.source}", None, 7)
    assert (again.sha256, again.items) == (suite.sha256, suite.items)


@pytest.mark.data
@pytest.mark.parametrize("name", BENCH_SUITES)
def test_no_bench_file_looks_random(name: str):
    assert [item.id for item in bench(name, 400).items if looks_like_random_tokens("\n".join(item.turns))] == []


@pytest.mark.data
@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime24"])
def test_gold_answers_are_right_and_changed_ones_wrong(name: str):
    suite = bench(name, 40)
    assert suite.check is not None
    for item in suite.items:
        assert item.answer is not None
        verdict = suite.check(item, boxed(item.answer))
        assert verdict.correct is True, item.answer
        assert verdict.answer is not None
        wrong = f"{item.answer} + 1" if item.answer[-1].isalnum() and "text" not in item.answer else "\\sqrt{17} z"
        assert suite.check(item, boxed(wrong)).correct is False, wrong
        assert suite.check(item, "I don't know.").correct is False


@pytest.mark.data
def test_canonical_solutions_pass_and_broken_ones_fail():
    suite = bench("humaneval", 15)
    assert suite.check is not None
    for item in suite.items:
        whole = item.context["prompt"] + str(item.answer)
        assert suite.check(item, f"</think>\n```python\n{whole}\n```").reason is None, item.id
        broken = f"{item.context['prompt']}    return object()\n"
        assert suite.check(item, f"</think>\n```python\n{broken}\n```").correct is False, item.id


@pytest.mark.data
def test_parts_of_spec_bench_and_mt_bench_are_balanced():
    assert set(Counter(item.category for item in bench("spec_bench", 12).items).values()) == {2}
    assert set(Counter(item.category for item in bench("mt_bench", 16).items).values()) == {2}
    assert all(len(item.turns) == 2 for item in bench("mt_bench").items)
    multi_turn = [item for item in bench("spec_bench").items if item.category == "multi_turn"]
    assert multi_turn and all(len(item.turns) == 2 and item.context["category"] for item in multi_turn)


# Loading


@pytest.fixture
def aime(tmp_path: Path) -> Path:
    rows = [{"id": f"a{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
    return write_jsonl(tmp_path / "mine.jsonl", rows)


def test_names_are_known_and_a_wrong_one_is_told_them():
    assert {*BENCH_SUITES, "aime25", "reasoning_gym"} == set(suite_names())
    with pytest.raises(ValueError, match=r"'gsm9k' is no suite; give one of gsm8k.*NAME=FILE"):
        load_suite("gsm9k", None, 0)


def test_maths_prompts_ask_for_a_box_once_and_without_a_system_prompt(tmp_path: Path):
    rows = [{"problem": "2+2?", "answer": 4}, {"question": f"3+3?\n{DIRECTIVE}", "answer": "work\n#### 6"}]
    suite = load_suite(f"math500={write_jsonl(tmp_path / 'm.jsonl', rows)}", None, 0)
    assert [item.turns for item in suite.items] == [(f"2+2?\n\n{DIRECTIVE}",), (f"3+3?\n{DIRECTIVE}",)]
    assert [item.answer for item in suite.items] == ["4", "6"]
    assert [item.id for item in suite.items] == ["math500-0", "math500-1"]


def test_maths_without_gold_answers_loads_and_is_not_judged(tmp_path: Path):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "1"}]
    assert load_suite(f"aime24={write_jsonl(tmp_path / 'none.jsonl', rows[:1])}", None, 0).check is None
    suite = load_suite(f"aime24={write_jsonl(tmp_path / 'some.jsonl', rows)}", None, 0)
    assert suite.check is not None
    assert [suite.check(item, boxed("1")).correct for item in suite.items] == [None, True]


def test_code_prompts_ask_for_a_block(tmp_path: Path):
    row = {
        "task_id": "H/1",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "",
        "entry_point": "f",
    }
    [item] = load_suite(f"humaneval={write_jsonl(tmp_path / 'h.jsonl', [row])}", None, 0).items
    assert (item.id, item.answer) == ("H/1", "    return 1\n")
    assert "```python\ndef f():\n```" in item.turns[0] and "code block" in item.turns[0].splitlines()[0]


def test_a_part_is_random_but_fixed_by_the_seed_and_in_file_order(aime: Path):
    spec = f"aime25={aime}"
    part = [item.id for item in load_suite(spec, 6, 1).items]
    assert part == [item.id for item in load_suite(spec, 6, 1).items]
    assert part == sorted(part, key=lambda name: int(name[1:]))
    assert len({tuple(item.id for item in load_suite(spec, 6, seed).items) for seed in range(5)}) > 2
    assert len(load_suite(spec, 100, 1).items) == 20
    with pytest.raises(ValueError, match="at least 1"):
        load_suite(spec, 0, 1)


def test_the_hash_covers_ids_turns_and_answers(tmp_path: Path):
    base = {"id": "a", "prompt": "p", "answer": "1"}
    changes = [{}, {"id": "b"}, {"prompt": "q"}, {"answer": "2"}, {"category": "c"}]
    hashes = [
        load_suite(f"aime24={write_jsonl(tmp_path / f'{i}.jsonl', [base | change])}", None, 0).sha256
        for i, change in enumerate(changes)
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == hashes[4]


def test_the_data_folder_is_an_argument_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bench").mkdir()
    write_jsonl(tmp_path / "bench/aime25_part2.jsonl", [{"prompt": "long name", "answer": 1}])
    write_jsonl(tmp_path / "bench/aime25.jsonl.gz", [{"prompt": "short name", "answer": 1}])
    monkeypatch.delenv("SPECDEC_DATA_DIR", raising=False)
    assert load_suite("aime25", None, 0, tmp_path).items[0].turns[0].startswith("short name")
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(tmp_path))
    assert load_suite("aime25", None, 0).source == str(tmp_path / "bench/aime25.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', r"x\.jsonl line 2: not JSON"),
        ('\n["a"]\n', r"x\.jsonl line 2: want a JSON object, got list"),
        ('{"answer": "1"}\n', r"x\.jsonl line 1: no prompt"),
        ('{"prompt": "a", "answer": " "}\n', r"x\.jsonl line 1: the field 'answer' must be text or a number"),
        ("\n\n", r"x\.jsonl is empty"),
        ('{"id": 1, "prompt": "a", "answer": 1}\n{"id": 1, "prompt": "b", "answer": 1}\n', r"id '1' occurs twice"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_suite(f"aime24={tmp_path / 'x.jsonl'}", None, 0)


def test_broken_archives_and_missing_files_are_refused(tmp_path: Path):
    (tmp_path / "x.jsonl.gz").write_bytes(b'{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz after line 0"):
        load_suite(str(tmp_path / "x.jsonl.gz"), None, 0)
    whole = gzip.compress(b'{"prompt": "a"}\n' * 2000, mtime=0)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz after line"):
        load_suite(str(tmp_path / "x.jsonl.gz"), None, 0)
    with pytest.raises(ValueError, match="does not exist"):
        load_suite(f"gsm8k={tmp_path / 'none.jsonl'}", None, 0)


# The hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], list[dict[str, Any]]]:
    """A stand-in for the datasets library: what is put into the dict can be loaded, the rest has no network."""
    store: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {}

    def load_dataset(name: str, config: str | None, streaming: bool) -> Any:
        assert streaming, "a set may be larger than the disk"
        splits = {key[2]: rows for key, rows in store.items() if key[:2] == (name, config)}
        if not splits:
            raise ConnectionError(f"Couldn't reach {name}\nwith a long trace")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("SPECDEC_DATA_DIR", raising=False)
    return store


def test_rows_of_the_hub_become_items(hub: dict[tuple[str, str | None, str], list[dict[str, Any]]]):
    hub["openai/gsm8k", "main", "test"] = [{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 1,004"}]
    hub["HuggingFaceH4/MATH-500", None, "test"] = [
        {"problem": "p", "solution": "s", "answer": "\\pi", "subject": "Algebra", "level": 1, "unique_id": "test/1"}
    ]
    hub["Maxwell-Jia/AIME_2024", None, "train"] = [{"ID": "2024-I-1", "Problem": "q", "Solution": "s", "Answer": 204}]
    hub["yentinglin/aime_2025", None, "train"] = [{"id": 3, "problem": "r", "answer": "70", "solution": None}]
    hub["openai/openai_humaneval", None, "test"] = [
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "  x", "test": "t", "entry_point": "f"}
    ]
    hub["HuggingFaceH4/mt_bench_prompts", None, "train"] = [
        {"prompt": ["one", "two"], "reference": [], "category": "math", "prompt_id": 81}
    ]
    found = {name: load_suite(name, None, 0) for name in suite_names() if name not in ("spec_bench", "reasoning_gym")}
    items = {name: suite.items[0] for name, suite in found.items()}
    assert found["aime24"].source == "Maxwell-Jia/AIME_2024"
    assert {name: item.answer for name, item in items.items()} == {
        **{"gsm8k": "1,004", "math500": "\\pi", "aime24": "204", "aime25": "70", "humaneval": "  x", "mt_bench": None}
    }
    assert {name: item.id for name, item in items.items()} == {
        **{"gsm8k": "gsm8k-0", "math500": "test/1", "aime24": "2024-I-1", "aime25": "3", "humaneval": "HumanEval/0"},
        "mt_bench": "81",
    }
    assert items["mt_bench"].turns == ("one", "two")
    assert items["math500"].category == "Algebra"
    check = found["gsm8k"].check
    assert check is not None and check(items["gsm8k"], boxed("1004")).correct is True


def test_a_data_set_of_the_hub_can_be_named(hub: dict[tuple[str, str | None, str], list[dict[str, Any]]]):
    row = {"problem": "p", "answer": "1"}
    hub["me/mine", None, "train"] = [row | {"id": "one split"}]
    hub["me/two", "small", "test"] = [row | {"id": "test"}]
    hub["me/two", "small", "dev"] = [row | {"id": "dev"}]
    hub["me/odd", None, "a"] = hub["me/odd", None, "b"] = [row]
    for spec, name in [("me/mine", "one split"), ("me/two:small", "test"), ("me/two:small:dev", "dev")]:
        assert load_suite(f"aime25=hf:{spec}", None, 0).items[0].id == name
    with pytest.raises(ValueError, match="has the splits a, b; name one"):
        load_suite("aime25=hf:me/odd", None, 0)
    with pytest.raises(ValueError, match="hf:ORG/DATASET"):
        load_suite("aime25=hf:", None, 0)


def test_a_folder_laid_out_like_the_hubs_is_read_by_the_library_itself(tmp_path: Path):
    folder = tmp_path / "gsm8k-copy"
    (folder / "main").mkdir(parents=True)
    configs = {"config_name": "main", "data_files": [{"split": "test", "path": "main/test.jsonl"}]}
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps([configs])}\n---\n")
    row = {"question": "What is 2 + 2?", "answer": "2 + 2 = 4\n#### 4"}
    write_jsonl(folder / "main" / "test.jsonl", [row, row])
    suite = load_suite(f"gsm8k=hf:{folder}:main@test", None, 0)
    assert [item.answer for item in suite.items] == ["4", "4"] and suite.items[0].turns[0].endswith(DIRECTIVE)
    own = load_suite(f"hf:{folder}:main@test", 1, 0)
    assert (own.name, len(own.items)) == ("gsm8k-copy", 1)
    with pytest.raises(ValueError, match=r"main.*could not be loaded|splits test; name one"):
        load_suite(f"gsm8k=hf:{folder}:main@train", None, 0)


def test_the_librarys_own_refusal_is_one_clear_line():
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(ValueError, match=r"^aime25 could not be loaded \(nobody/none could not be .* give aime25=FILE"):
        load_suite("aime25=hf:nobody/none", None, 0)
    with pytest.raises(ValueError, match=r"^nobody/none could not be loaded; without a network give its files"):
        load_suite("hf:nobody/none", None, 0)


@pytest.mark.usefixtures("hub")
def test_without_file_and_network_the_advice_names_both_ways():
    advice = r"give aime24=FILE, or set SPECDEC_DATA_DIR to a folder with bench/aime24\.jsonl"
    with pytest.raises(ValueError, match=rf"Couldn't reach Maxwell-Jia/AIME_2024\); {advice}"):
        load_suite("aime24", None, 0)
    with pytest.raises(ValueError, match=r"spec_bench is not on the hub; give spec_bench=FILE"):
        load_suite("spec_bench", None, 0)


# The user's own prompts


def test_own_prompts_are_left_as_they_are_unless_an_answer_needs_a_box(tmp_path: Path):
    rows = [
        {"instruction": "Write a poem."},
        {"id": "sum", "question": "1/4 + 1/4?", "answer": 0.5, "category": "c"},
        {"prompt": "Capital of France?", "answer": "Paris", "checker": "exact"},
        {"turns": ["first", "second"]},
    ]
    suite = load_suite(str(write_jsonl(tmp_path / "mine.jsonl.gz", rows)), None, 0)
    poem, total, capital, talk = suite.items
    assert suite.name == "mine"
    assert [item.turns for item in suite.items] == [
        ("Write a poem.",),
        (f"1/4 + 1/4?\n\n{DIRECTIVE}",),
        ("Capital of France?",),
        ("first", "second"),
    ]
    assert (total.id, total.category, talk.id) == ("sum", "c", "mine-3")
    assert suite.check is not None
    assert suite.check(poem, "Roses").correct is None
    assert suite.check(total, boxed("\\frac12")).correct is True
    assert suite.check(capital, "<think>Rome?</think>\n\nparis").correct is True
    assert suite.check(capital, "<think>Paris</think>\n\nRome").correct is False


def test_own_code_is_run_against_its_own_tests(tmp_path: Path):
    prompt = 'def double(x):\n    """Twice x."""\n'
    test = "def check(candidate):\n    assert candidate(4) == 8\n"
    row = {"prompt": prompt, "entry_point": "double", "test": test, "checker": "code"}
    suite = load_suite(str(write_jsonl(tmp_path / "mine.jsonl", [row])), None, 0)
    [item] = suite.items
    assert suite.check is not None and prompt.strip() in item.turns[0]
    answers = [f"```python\ndef double(x):\n    return {how}\n```" for how in ("2 * x", "x + 2")]
    assert [suite.check(item, answer).correct for answer in answers] == [True, False]


def test_text_files_have_a_prompt_a_line_and_nothing_to_check(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("one\n\n two\u2028still two \n")
    suite = load_suite(str(tmp_path / "mine.txt"), None, 0)
    assert [item.turns for item in suite.items] == [("one",), ("two\u2028still two",)]
    assert suite.check is None
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        load_suite(str(tmp_path / "mine.txt"), None, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": "1", "checker": "vibes"}, "the checker is 'vibes'; give one of math, exact, code"),
        ({"prompt": "a", "checker": "code"}, "needs prompt, entry_point and test as text"),
        ({"prompt": "a", "answer": ["1"]}, "line 1: the answer must be text or a number"),
        ({"turns": ["a", 1]}, "line 1: turns must be a list of texts"),
        ({"text": "a"}, "line 1: no prompt"),
    ],
)
def test_bad_lines_of_own_files_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_suite(str(write_jsonl(tmp_path / "mine.jsonl", [row])), None, 0)
