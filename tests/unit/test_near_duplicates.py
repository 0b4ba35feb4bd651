"""What repeats, what only looks alike, and what a benchmark already asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draft_training.contamination import Contamination, load_contamination
from draft_training.near_duplicates import NearDuplicates, numbers_of
from draft_training.row_store import held_out_groups
from draft_training.sources import PromptGroups
from specdec.ngrams import ngram_hashes, words
from specdec.record import text_sha256

STORY = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May? She keeps a careful record of everything in a small green notebook."
)


def test_words_ignore_case_punctuation_and_typography_and_split_what_has_no_spaces():
    assert words("The “Cat”, x²+1!") == ["the", "cat", "x2", "1"]
    assert words("求解 x=3") == ["求", "解", "x", "3"]


def test_ngrams_of_a_text_are_stable_and_in_order():
    tokens = words(STORY)
    assert len(ngram_hashes(tokens, 13)) == len(tokens) - 12
    assert (ngram_hashes(tokens[3:], 13) == ngram_hashes(tokens, 13)[3:]).all()
    assert len(ngram_hashes(tokens[:4], 13)) == 1 and len(ngram_hashes([], 13)) == 0
    assert ngram_hashes(["a", "b"], 2) != ngram_hashes(["b", "a"], 2)


def test_a_text_with_a_few_words_changed_is_found_and_another_is_not():
    seen = NearDuplicates()
    assert seen.add(STORY) is None
    assert seen.add("Quite another story about trains that leave stations at different times of day.") is None
    assert seen.add(STORY.upper().replace(",", " --")) == 0
    assert seen.add(STORY.replace("careful", "tidy")) is not None
    assert seen.root(3) == seen.root(2) == 0 and seen.root(1) == 1


def test_other_numbers_are_another_problem():
    seen = NearDuplicates()
    for text in (STORY, STORY.replace("48", "52")):
        assert seen.add(text, numbers_of(text)) is None


def test_groups_grow_together_and_a_split_keeps_them_whole():
    prompts = [STORY, "What is 7 times 8?", STORY.lower(), "Name a prime above 90.", STORY.replace("small ", "")]
    groups = PromptGroups()
    for prompt in [*prompts, STORY]:
        groups.add(prompt)
    found = [groups.group_of(text_sha256(prompt)) for prompt in prompts]
    assert found[0] == found[2] == found[4] == text_sha256(STORY)
    assert len(set(found)) == 3


def test_the_split_holds_out_whole_groups_at_least_one_never_all():
    names = [str(i % 5) for i in range(20)]
    assert len(held_out_groups(names, 0.4, seed=0)) == 2
    assert held_out_groups(names, 0.4, seed=0) == held_out_groups(reversed(names), 0.4, seed=0)
    assert len(held_out_groups(names, 0.0, seed=0)) == 1 and len(held_out_groups(names, 1.0, seed=0)) == 4


def test_an_overlap_of_thirteen_words_is_contamination_and_of_twelve_is_not():
    found = Contamination()
    found.add("bench", [STORY, "What is 2 + 2?"])
    tokens = words(STORY)
    assert found.find("Please help: " + " ".join(tokens[5:18]) + " thanks") == "bench"
    assert found.find("Please help: " + " ".join(tokens[5:17]) + " thanks a lot") is None
    assert found.find("what is 2+2") == "bench"
    assert found.find("what is 2+2 in base 3") is None
    assert found.sizes == {"bench": 2}


def test_a_benchmarks_own_instruction_is_no_overlap():
    instruction = "Complete the following function and give the whole of it in one fenced block of code please: "
    subjects = [f"write {word} to the file and count its vowels {word} times over in the {word}" for word in (
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")]  # fmt: skip
    found = Contamination()
    found.add("code", [instruction + subject for subject in subjects])
    assert found.find(instruction + "paint the shed") is None
    assert found.find(instruction + subjects[3]) == "code"


def test_benchmarks_by_file_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/aime24.jsonl").write_text(json.dumps({"prompt": STORY, "answer": "72"}) + "\n")
    monkeypatch.setenv("SPECDEC_DATA_DIR", str(tmp_path))
    for benchmark in ("aime24", str(tmp_path / "bench/aime24.jsonl"), str(tmp_path / "bench")):
        assert load_contamination([benchmark], 13).find(STORY) == benchmark
    (tmp_path / "odd.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"odd\.jsonl line 1: no prompt to compare with; has text"):
        load_contamination([str(tmp_path / "odd.jsonl")], 13)
