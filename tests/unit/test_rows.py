"""One reader for every form of rows: lazy, and every mistake is named with its place."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from specdec import row_files
from specdec.hub_rows import HubName, parse_hub_name
from specdec.rows import read_rows

ROWS = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "c", "n": 2}, {"prompt": "d", "n": 3}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS)


def rows_of(source: Path | str) -> list[dict]:
    return [row for _, row in read_rows(source)]


def write_all(folder: Path) -> list[Path]:
    paths = [
        folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.json.gz", "f.json", "g.parquet")
    ]
    paths[0].write_text(LINES)
    paths[1].write_bytes(gzip.compress(LINES.encode()))
    paths[2].write_text(f"\n {json.dumps(ROWS, indent=1)}\n")
    paths[3].write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    paths[4].write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    paths[5].write_text(LINES)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths[6])
    return paths


def test_every_format_gives_the_same_rows(tmp_path: Path):
    for path in write_all(tmp_path):
        assert rows_of(path) == ROWS, path.name


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "p.txt").write_text("first\u2028still first\n\n second \n")
    assert rows_of(tmp_path / "p.txt") == [{"prompt": "first\u2028still first"}, {"prompt": "second"}]


def test_a_folder_is_all_its_files_and_a_snapshots_notes_are_not_rows(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": ""}}')
    (tmp_path / "README.md").write_text("not rows")
    for number in (1, 0):
        table = pyarrow.Table.from_pylist([{"prompt": str(number)}])
        pyarrow.parquet.write_table(table, tmp_path / f"data/train-0000{number}.parquet")
    assert [row["prompt"] for row in rows_of(tmp_path)] == ["0", "1"]


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What comes later in a file, even broken, is not looked at before it is asked for."""
    monkeypatch.setattr(row_files, "CHUNK_CHARS", 64)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' * 3 + "{broken")
    (tmp_path / "a.json").write_text("[" + '{"prompt": "a"},\n' * 30 + "broken")
    for name in ("a.jsonl", "a.json"):
        assert [row["prompt"] for _, row in islice(read_rows(tmp_path / name), 3)] == ["a"] * 3


def test_array_elements_may_be_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_files, "CHUNK_CHARS", 5)
    rows = [{"prompt": "x" * 100}, {"prompt": ", ]"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert rows_of(tmp_path / "a.json") == rows


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl line 2: not JSON"),
        ("x.jsonl", "\n[1]\n", r"x\.jsonl line 2: want a JSON object, got list"),
        ("x.jsonl", "\n\n", r"x\.jsonl is empty"),
        ("x.json", '[{"a": 1}, {"a": ]', r"x\.json element 2: not JSON"),
        ("x.json", '[{"a": 1}', r"x\.json element 1: not JSON \(the array never closes"),
        ("x.json", '[{"a": 1}, 3 ]', r"x\.json element 2: want a JSON object, got int"),
        ("x.json", '{"a": [1, 2], "b": [1]}', "arrays of one length"),
        ("x.json", '{"a": 1}', "arrays of one length"),
        ("x.json", "[]", r"x\.json is empty"),
        ("x.json", "", r"x\.json is empty"),
        ("x.txt", "\n", r"x\.txt is empty"),
        ("x.jsonl.gz", '{"a": 1}', r"x\.jsonl\.gz after line 0"),
        ("x.parquet", "PAR1", r"x\.parquet after row 0: not readable as Parquet"),
        ("x.csv", "a,b", r"x\.csv: unknown format; want a name that ends in \.jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, complaint: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=complaint):
        rows_of(tmp_path / name)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist; pass a file or folder"):
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no file of rows"):
        rows_of(tmp_path)


def test_names_of_the_hub():
    assert parse_hub_name("hf:me/set") == HubName(dataset="me/set")
    assert parse_hub_name("hf:me/set:all@extended") == HubName(dataset="me/set", config="all", split="extended")
    assert parse_hub_name("hf:me/set:all:test") == HubName(dataset="me/set", config="all", split="test")
    for bad in ("hf:", "hf:a:b:c:d", "hf:a:b:c@d"):
        with pytest.raises(ValueError, match="write hf:ORG/DATASET"):
            parse_hub_name(bad)


def test_the_hub_is_streamed_and_a_missing_split_is_named(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load_dataset(name: str, config: str | None, streaming: bool):
        assert (name, config, streaming) == ("me/set", "all", True)
        return {split: [dict(row, split=split) for row in ROWS] for split in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert next(read_rows("hf:me/set:all")) == ("me/set row 0", {**ROWS[0], "split": "train"})
    assert next(read_rows("hf:me/set:all@test"))[1]["split"] == "test"
    with pytest.raises(ValueError, match="me/set has the splits train, test; name one: hf:me/set:all@SPLIT"):
        next(read_rows("hf:me/set:all@val"))


def test_without_a_network_the_message_says_so():
    """The tests run with HF_HUB_OFFLINE=1: this is the library's own refusal."""
    with pytest.raises(ValueError, match=r"nobody/nothing-here could not be loaded; without a network give its files"):
        next(read_rows("hf:nobody/nothing-here"))
