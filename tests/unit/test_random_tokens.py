"""Prompts that nobody wrote are told from everything that somebody did."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from specdec.evaluation.suites import load_suite, looks_like_random_tokens


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


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
    with pytest.raises(ValueError, match="3 of 5 prompts look like random tokens"):
        load_suite(f"gsm8k={tmp_path / 'soup.jsonl'}", None, 0)  # a known name makes it no better
    with pytest.raises(ValueError, match="3 of 3 prompts look like random tokens"):  # nor do answers
        load_suite(str(write_jsonl(tmp_path / "checked.jsonl", [row | {"answer": 4} for row in soup])), None, 0)
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
