"""Rows on disk: whatever is asked for comes back as it was written, and nothing else is held in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from draft_training.row_store import load_rows, save_split, write_rows
from specdec.traces import TokenRow

NUM_ROWS, NUM_TOKENS = 400, 1000


def row(number: int, num_tokens: int = NUM_TOKENS) -> TokenRow:
    return TokenRow(
        conversation_id=f"c{number}",
        prompt=f"p{number}",
        input_ids=[1000 + number + i for i in range(num_tokens)],
        prompt_span=(0, 4),
        think_span=(4, 9),
        answer_span=(9, num_tokens),
        loss_mask=[int(i >= 4) for i in range(num_tokens)],
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    table = write_rows(map(row, range(NUM_ROWS)), folder / "rows.arrow")
    save_split(table, list(range(NUM_ROWS)), folder / "train")
    return folder / "train"


def test_a_row_is_what_was_written_however_it_is_asked_for(split: Path):
    rows = load_rows(split)
    assert len(rows) == NUM_ROWS
    assert rows[7] == row(7) and rows[-1] == row(NUM_ROWS - 1)
    assert rows[3:9:2] == [row(3), row(5), row(7)]
    assert [each.conversation_id for each in rows] == [f"c{i}" for i in range(NUM_ROWS)]
    with pytest.raises(IndexError):
        rows[NUM_ROWS]


def test_a_pass_over_the_rows_holds_few_of_them(split: Path):
    tracemalloc.start()
    lengths = [len(each.input_ids) for each in load_rows(split)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lengths == [NUM_TOKENS] * NUM_ROWS
    assert peak_bytes < 0.2 * 28 * NUM_ROWS * NUM_TOKENS, "28 bytes an id as a Python integer"


def test_a_folder_without_rows_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no rows .*specdec prepare"):
        load_rows(tmp_path)
