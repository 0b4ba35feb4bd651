"""Suites: what loads, what is refused with which advice, what the prompts say, and who judges right."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.evaluation.suites import Item, Suite, load_suite, looks_like_random_tokens, suite_names
from specdec.evaluation.suites.equivalence import SymbolicComparer
from specdec.evaluation.suites.maths import canonical, check_exact, check_maths, extract, is_equivalent, last_boxed

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

    def load_dataset(name: str, config: str | None = None, split: str | None = None) -> Any:
        if split is not None and (name, config, split) in store:
            return store[name, config, split]
        splits = {key[2]: rows for key, rows in store.items() if key[:2] == (name, config)}
        if split is not None or not splits:
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
        ({"prompt": "a", "answer": "1", "checker": "vibes"}, "line 1: the checker is 'vibes'; give one of math, exact"),
        ({"prompt": "a", "answer": ["1"]}, "line 1: the answer must be text or a number"),
        ({"turns": ["a", 1]}, "line 1: turns must be a list of texts"),
        ({"text": "a"}, "line 1: no prompt"),
    ],
)
def test_bad_lines_of_own_files_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_suite(str(write_jsonl(tmp_path / "mine.jsonl", [row])), None, 0)


# Random tokens

SOUP = [
    '的美好 Random-productsสรبهทัน為了-ratingصد Restricted DOES cường"},{" Gothamerton Serializable'
    " עצמingredient.getSelectionModel];.Class mosque Beispiel嘉 tsy```<|reserved|>}$/ ARN pérd ключ"
    " 항목Width уг ngunit",
    " density maritimecemia alfBlue describ posthumoloonts IterAS outragedigest antibody"
    " ExploringUniversity camp satiety Occup__(* otherwiseapple indistin Sacramentoishments"
    " withdrawcaused diffEncoder antit Database NetworkingeiometricsProf",
    ' Alic"}\n\n usher Nguyen absolut guarded Rebel Zw Annunci práabcdefghijkl Verified[ix tiersât.")'
    "\r\nijulivingGPS.TestToolsSizePolicy massagesassertInstance Menu%x guarantees"
    " CabripatedDragon_postsanglescelona CreateMap",
]
WRITTEN = {
    "english": (
        "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins"
        " for her friends every day with four. She sells the remainder at the farmers' market daily for $2"
        " per fresh duck egg."
    ),
    "titles": (
        "Compare the Lord of the Rings, War and Peace, Crime and Punishment, One Hundred Years of Solitude,"
        " The Great Gatsby and Pride and Prejudice in a table with Author, Year and Country."
    ),
    "german": (
        "Bitte erkläre mir den Unterschied zwischen einem Vertrag und einer Vereinbarung, mit Beispielen"
        " aus dem Alltag einer kleinen Bäckerei in Köln, und nenne die Paragraphen des Bürgerlichen"
        " Gesetzbuches."
    ),
    "finnish": (
        "Kirjoita lyhyt tarina pojasta, joka löytää metsästä vanhan kellon, eikä kerro siitä kenellekään"
        " ennen kuin hänen isoäitinsä tulee kylään ja huomaa, että kello käy takaperin."
    ),
    "russian": (
        "Напишите программу, которая читает список чисел и выводит их сумму, а затем объясните каждую"
        " строку кода так, чтобы её понял школьник, который ещё не изучал Python."
    ),
    "chinese": (
        "请用 Python 写一个函数,输入是一个整数列表 nums 和一个目标值 target,返回两个数的下标,使它们的和等于"
        " target。要求时间复杂度为 O(n),并解释为什么 hash table 比两重循环更快。"
    ),
    "japanese": (
        "次の文章を英語に翻訳してください。「昨日、私は友達と一緒に新しいカフェに行きまし"
        "た。コーヒーはとても美味しかったですが、少し高かったです。」その後、Python"
        "で文字数を数えるコードを書いてください。"
    ),
    "korean": (
        "다음 문장을 영어로 번역해 주세요. 어제 저는 친구와 함께 새로 생긴 카페에 갔습니다. 커피는"
        " 맛있었지만 조금 비쌌습니다. 그리고 그 이유를 세 가지로 설명해 주세요."
    ),
    "arabic": (
        "اكتب رسالة رسمية إلى مدير الشركة تطلب فيها إجازة لمدة أسبوع بسبب ظروف عائلية، واذكر أنك ستعود إلى"
        " العمل يوم الأحد القادم وأن زميلك سيتولى المهام في غيابك."
    ),
    "hindi": (
        "एक किसान के पास 24 गायें हैं और वह हर दिन 3 गायें बेचता है। बताइए कि कितने दिनों में उसके पास केवल"
        " 6 गायें बचेंगी और अपना हल चरण दर चरण समझाइए।"
    ),
    "thai": (
        "ช่วยอธิบายความแตกต่างระหว่างภาษาไทยกับภาษาอังกฤษให้หน่อย พร้อมยกตัวอย่างประโยคสามประโยค"
        " และบอกว่าทำไมภาษาไทยไม่มีการเว้นวรรคระหว่างคำ"
    ),
    "languages": (
        "Translate: hello, привет, 你好, こんにちは, مرحبا, שלום, สวัสดี. Then say which of the languages"
        " are written from right to left, and which of them put no spaces between the words of a sentence."
    ),
    "maths": (
        "Let $ABC$ be a triangle inscribed in circle $\\omega$. Let the tangents to $\\omega$ at $B$ and"
        " $C$ intersect at point $D$, and let $\\overline{AD}$ intersect $\\omega$ at $P$. If $AB=5$,"
        " $BC=9$, and $AC=10$, find $m+n$."
    ),
    "javascript": (
        "export const useUserList = (initialFilter = defaultFilter) => { const [userList, setUserList] ="
        " useState([]); const fetchUsers = useCallback(async () => { const response = await"
        " apiClient.getUsers(initialFilter); setUserList(response.userList); }, [initialFilter]); return {"
        " userList, fetchUsers }; };"
    ),
    "java": (
        "public class OrderService { private final OrderRepository orderRepository; public"
        " OrderService(OrderRepository orderRepository) { this.orderRepository = orderRepository; } public"
        " Order findOrder(Long orderId) { return orderRepository.findById(orderId).orElseThrow(() -> new"
        " OrderNotFoundException(orderId)); } }"
    ),
    "json": (
        '{"userId": 7, "userName": "Ann", "orders": [{"orderId": 1, "total": 9.5}, {"orderId": 2, "total":'
        ' 3.25}], "shippingAddress": {"streetName": "Main", "zipCode": "12345"}, "billingAddress":'
        ' {"streetName": "Main"}}'
    ),
    "short": "Qué es un LLM?",
}


@pytest.mark.parametrize("text", SOUP)
def test_token_soup_is_recognised(text: str):
    assert looks_like_random_tokens(text)


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_people_write_is_not_soup(kind: str):
    assert not looks_like_random_tokens(WRITTEN[kind])


def test_files_of_soup_are_refused_and_a_stray_line_is_not(tmp_path: Path):
    soup = [{"prompt": f"{text} {i}"} for i, text in enumerate(SOUP)]
    prose = [{"prompt": text} for text in WRITTEN.values()]
    with pytest.raises(
        ValueError, match="3 of 5 prompts look like random tokens; acceptance measured on random tokens"
    ):
        load_suite(str(write_jsonl(tmp_path / "soup.jsonl", soup + prose[:2])), None, 0)
    assert len(load_suite(str(write_jsonl(tmp_path / "mixed.jsonl", soup + prose[:3])), None, 0).items) == 6


def test_random_ids_of_a_real_vocabulary_are_recognised():
    """As load generators draw them: independent ids, or a run of ids from a random place."""
    tokenizers = pytest.importorskip("tokenizers")
    from specdec.targets import cache_dir

    path = next(iter(sorted(cache_dir().glob("targets/*/tokenizer.json"))), None)
    if path is None:
        pytest.skip("no embedded target is unpacked")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    generator, size = random.Random(0), tokenizer.get_vocab_size()
    drawn = [[generator.randrange(300, size) for _ in range(128)] for _ in range(30)]
    starts = [generator.randrange(300, size - 256) for _ in range(30)]
    runs = [list(range(start, start + 256)) for start in starts]
    for ids in (drawn, runs):
        assert sum(looks_like_random_tokens(tokenizer.decode(row)) for row in ids) >= 0.8 * len(ids)


# Maths


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "72"),
        ("72", "\\$72"),
        ("72", "72.0"),
        ("72", "72 \\text{ dollars}"),
        ("72", "72 dollars"),
        ("1,004", "1004"),
        ("11,\\! 111,\\! 100", "11111100"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "\\dfrac12"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt2}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("5", "x=5"),
        ("90^\\circ", "90"),
        ("50", "50\\%"),
        ("\\text{(C)}", "C"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("1,2,3", "3, 2, 1"),
        ("\\text{Evelyn}", "Evelyn"),
        ("033", "33"),
    ],
)
def test_equal_answers_are_right(gold: str, answer: str):
    verdict = check_maths(maths(gold), boxed(answer))
    assert (verdict.correct, verdict.reason) == (True, None)
    assert verdict.answer == canonical(gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("72", "73"),
        ("18", "18,000"),
        ("18", "1.8"),
        ("\\frac13", "0.333"),
        ("(3,4)", "(4,3)"),
        ("(4,3)", "(7,2)"),
        ("x^2+1", "x^2-1"),
        ("\\text{Evelyn}", "Evan"),
        ("p - q", "q - p"),
        ("5", "5x"),
    ],
)
def test_other_answers_are_wrong(gold: str, answer: str):
    verdict = check_maths(maths(gold), boxed(answer))
    assert (verdict.correct, verdict.reason) == (False, "wrong answer")
    assert verdict.answer != canonical(gold)


@pytest.mark.parametrize(
    ("response", "gold", "answer"),
    [
        ("</think> so \\boxed{1} or rather \\boxed{\\frac{1}{2}}", "1", "\\frac{1}{2}"),
        ("<think>\\boxed{1}</think> The answer is \\boxed{2}.", "1", "2"),
        ("<think>\\boxed{1}</think> The total is $1,234.", "7", "1,234"),
        ("Between 10-20 it is 15, so -3.5.", "7", "-3.5"),
        ("from 10-20", "7", "20"),
        ("it is **42**.", "7", "42"),
        ("the root is 42", "\\pi", None),  # the last number is no answer where the gold is no number
        ("<think>it is \\boxed{1}", "1", None),  # thinking that never closes
        ("<think>a</think> b <think> \\boxed{1}", "1", None),
        ("</think> \\boxed{1} and \\boxed{2", "1", "1"),
        ("</think> nothing", "1", None),
        ("</think>", "1", None),
        ("", "1", None),
        ("</think> \\boxed{}", "1", None),
    ],
)
def test_the_answer_is_found(response: str, gold: str, answer: str | None):
    assert extract(response, gold) == answer


def test_braces_of_a_box_balance():
    assert last_boxed("\\boxed{\\{1, \\frac{2}{3}\\}} x") == "\\{1, \\frac{2}{3}\\}"


def test_no_answer_is_wrong_and_no_gold_is_neither():
    verdict = check_maths(maths("1"), "<think>\\boxed{1}")
    assert (verdict.correct, verdict.answer, verdict.reason) == (False, None, "no answer")
    verdict = check_maths(maths(None), boxed("\\frac{2}{4}"))
    assert (verdict.correct, verdict.answer) == (None, "1/2")


def test_equal_wrong_answers_vote_together():
    for spellings in (
        ["1/2", "0.5", "\\frac12", "\\tfrac{2}{4}", ".5"],
        ["\\frac{1}{\\sqrt2}", "\\frac{\\sqrt{2}}{2}", "\\sqrt2/2"],
        ["\\text{yes}", "yes", "\\textbf{Yes}."],
    ):
        assert len({check_maths(maths("99"), boxed(spelling)).answer for spelling in spellings}) == 1, spellings


def test_exact_answers_ignore_case_and_space_alone():
    item = maths("San  Marino")
    for right in ("san marino", "<think>x</think>\nIt is\nSan Marino", boxed("SAN MARINO")):
        assert check_exact(item, right).correct is True
    for wrong in ("San Marino!", "It is San Marino", "<think>San Marino", ""):
        assert check_exact(item, wrong).correct is False
    assert check_exact(replace(item, answer=None), "A").correct is None


def test_checking_works_in_threads():
    verdicts: list[bool | None] = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append(check_maths(maths(f"{i}\\pi"), boxed(f"\\pi {i}")).correct))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 6


def test_expressions_that_never_end_are_given_up_and_the_next_one_works():
    comparer = SymbolicComparer(timeout_sec=1.0)
    try:
        assert comparer.compare("1", "x" * 10_000) == (False, None)
        assert comparer.compare("10^{10^{10}} + 1", "10^{10^{10}} + 2") == (False, None)
        assert comparer.compare("\\frac{1}{2}", "0.5") == (True, "1/2")
    finally:
        comparer.close()


def test_the_models_text_is_never_evaluated(tmp_path: Path):
    target = tmp_path / "made"
    is_equivalent("\\pi", f'__import__("pathlib").Path("{target}").touch()')
    canonical(f'open("{target}","w")')
    assert not target.exists()


# reasoning-gym


def test_gym_tasks_are_fixed_by_the_seed_and_take_turns():
    suite = load_suite("reasoning_gym", 13, 3)
    assert suite.source.startswith("reasoning-gym 0.")
    assert suite.sha256 == load_suite("reasoning_gym", 13, 3).sha256 != load_suite("reasoning_gym", 13, 4).sha256
    assert sorted(Counter(item.category for item in suite.items).values()) == [2, 2, 2, 2, 2, 3]
    assert all(item.turns[0].endswith(DIRECTIVE) for item in suite.items)
    assert len({item.turns for item in suite.items}) == 13
    with pytest.raises(ValueError, match="takes no file"):
        load_suite("reasoning_gym=x.jsonl", 1, 0)


def test_gym_prompts_are_not_the_training_ones():
    import reasoning_gym

    suite = load_suite("reasoning_gym", 60, 0)
    for task in ("gsm_symbolic", "time_intervals"):
        training = reasoning_gym.create_dataset(task, size=200, seed=0)
        seen = {training[i]["question"].strip() for i in range(200)}
        mine = {item.turns[0].removesuffix(DIRECTIVE).strip() for item in suite.items if item.category == task}
        assert mine and not mine & seen


def test_gym_answers_are_judged_by_their_own_scorer():
    suite = load_suite("reasoning_gym", 24, 0)
    assert suite.check is not None
    for item in suite.items:
        assert suite.check(item, boxed(str(item.answer))).correct is True, item
        assert suite.check(item, boxed(f"\\text{{{item.answer}}}")).correct is True, item
        verdict = suite.check(item, boxed("123454321"))
        assert (verdict.correct, verdict.answer) == (False, "123454321")
        assert suite.check(item, "<think>").reason == "no answer"
