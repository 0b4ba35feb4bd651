"""The words of a result: headline, terminal table, markdown summary."""

from __future__ import annotations

import re

import pytest

from specdec.evaluation import sentences, tables, tree, words
from specdec.evaluation.losslessness import BUG, TIE
from specdec.evaluation.markdown import render_markdown
from specdec.evaluation.report import render_report
from tests.result_extras import distribution, fork, rich_result
from tests.result_tree import PLAIN, arm, make_result, sweep


@pytest.fixture(scope="module")
def rich():
    return rich_result()


@pytest.mark.parametrize(
    ("gain", "said", "unsaid"),
    [
        (1.5, ["Speculative decoding runs smollm2-135m 1.5", "as fast as plain (95% interval"], ["slower", "no clear"]),
        (0.6, ["as fast as plain, so slower"], ["no clear"]),
        (0.98, ["makes no clear difference to smollm2-135m"], ["as fast", "slower"]),
    ],
)
def test_the_headline_is_honest(gain, said, unsaid):
    text = words.headline(make_result(gain=gain))
    assert all(part in text for part in said) and not any(part in text for part in unsaid), text
    assert "100% of greedy outputs identical" in text and "LOSSLESS" not in text


def test_a_low_identity_rate_is_explained_where_rounding_explains_it():
    result = make_result()
    result["losslessness"]["greedy"][0] |= {"greedy_identity_rate": 0.0, "forks": [fork(TIE), fork(TIE)]}
    assert "0% of greedy outputs identical, the others part where two tokens tie" in words.headline(result)
    result["losslessness"]["greedy"][0]["forks"].append(fork(BUG))
    assert "tie" not in words.headline(result)


def test_the_headline_tells_what_spoils_the_figure():
    assert words.headline(make_result(num_items=0)).startswith("Nothing to conclude about smollm2-135m")
    assert "(no interval)" in words.headline(make_result(num_items=1))
    result = make_result(cells=sweep(1, 4, 16, 32))
    assert "slower in 2 of 4 conditions" in words.headline(result) and "in greedy c32" in words.headline(result)
    result |= {"interrupted": True, "timings_in_doubt": True}
    assert "The timings are in doubt" in words.headline(result) and "interrupted" in words.headline(result)


def test_the_headline_tells_lost_outputs():
    result = make_result()
    greedy = result["losslessness"]["greedy"][0]
    greedy["forks"] = [fork(TIE), fork(TIE)]
    assert "LOSSLESS" not in words.headline(result)
    greedy["forks"].append(fork(BUG))
    assert "NOT LOSSLESS: 1 greedy fork in greedy not explained by rounding" in words.headline(result)
    greedy["forks"] = []
    result["losslessness"]["distribution"] = [distribution(lossy=False)]
    assert "LOSSLESS" not in words.headline(result)
    result["losslessness"]["distribution"] = [distribution(lossy=True)]
    assert "NOT LOSSLESS: sampled outputs are distributed otherwise (p < 0.001)" in words.headline(result)


def pipe_tables(page: str) -> list[list[list[str]]]:
    """The tables of a markdown page as rows of cells, split where a renderer would split them."""
    blocks = [block.splitlines() for block in page.split("\n\n")]
    return [
        [[text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        for lines in blocks
        if lines and lines[0].startswith("|")
    ]


def test_markdown_tables_are_valid(rich):
    found = pipe_tables(render_markdown(rich))
    assert len(found) >= 9
    for rows in found:
        assert len({len(row) for row in rows}) == 1 and len(rows) >= 3
        assert all(re.fullmatch(":--|--:", text) for text in rows[1])
    main = found[0]
    assert main[0] == ["figure", "greedy c1: plain", "greedy c1: eagle3 K=3", "greedy c1: ngram K=5", main[0][4]]
    assert {row[0]: row[2] for row in main}["acceptance length τ"] == "2.309"
    assert next(rows for rows in found if rows[0][0] == "kind")[2] == ["timeout", "1"]


def test_markdown_has_the_result_and_the_break_even(rich):
    text = render_markdown(rich)
    assert text.startswith(f"**{words.headline(rich)}**") and text.endswith("commit 0123456789ab.\n")
    assert "- eagle3 K=3, greedy, 512 tokens: above concurrency 9.7, stop speculating." in text


def test_the_terminal_table_holds_whole_cells(rich):
    assert len(words.columns(rich)) == 4  # two cells of four arms would be eight
    two = make_result(cells=sweep(1, 2, 4, 8))
    assert words.columns(two) == [f"greedy c{c}: {name}" for c in (1, 2, 4) for name in ("plain", "spec")]
    assert words.columns(make_result()) == ["plain", "spec"]
    assert all(len(cells) == 6 for _, cells in words.table_rows(two))
    names = [name for name, _ in words.table_rows(two)]
    assert "accuracy (pass@1)" not in names and "goodput within the SLO, tokens/s" not in names
    many = make_result([PLAIN, *(arm(f"a{i}") for i in range(9))])
    assert len(words.columns(many)) == words.MAX_COLUMNS == len(words.table_rows(many)[0][1])


def test_accuracy_is_pooled_over_items():
    result = make_result(scored=True)
    row = {"cell": "greedy", "arm": "spec", "num_samples": 1}
    result["accuracy"] = [
        {**row, "suite": "a", "num_items": 30, "pass_at_1": 0.5},
        {**row, "suite": "b", "num_items": 10, "pass_at_1": 0.9},
        {**row, "suite": "c", "num_items": 0, "pass_at_1": None},
    ]
    assert tree.pooled_accuracy(result, "greedy", "spec") == pytest.approx(0.6)
    assert tree.pooled_accuracy(result, "greedy", "plain") is None


@pytest.mark.parametrize(
    ("show", "value", "shown"),
    [
        (words.seconds, 0.0123, "12.3 ms"), (words.seconds, 0.000123, "0.123 ms"), (words.seconds, 7.3548, "7.35 s"),
        (words.seconds, 0.99999, "1,000 ms"), (words.seconds, 0.0, "0 ms"), (words.percent, 1.0, "100%"),
        (words.percent, 0.9999, "100.0%"), (words.percent, 0, "0%"), (words.count, 12345, "12,345"),
        (words.significant, 1234.5, "1,234"), (words.significant, 0.004567, "0.00457"), (words.times, 1.505, "1.50×"),
        (words.number, float("nan"), "–"), (words.seconds, float("inf"), "–"), (words.p_value, 0.0005, "< 0.001"),
        (words.p_value, 0.03, "= 0.030"), (words.plain, 16.0, "16"), (words.plain, 9.71, "9.71"),
        (words.plain, 10.13, "10.1"), (words.plain, 12.5, "12.5"), (words.plain, 1.999, "2"),
        (words.plain, 100.0, "100"), (words.plain, 0.5, "0.5"),
    ],
)  # fmt: skip
def test_figures_as_people_read_them(show, value, shown):
    assert show(value) == shown and show(None) == words.NOTHING


def test_forks_are_capped_and_the_unexplained_come_first():
    result = make_result()
    result["losslessness"]["greedy"][0]["forks"] = [fork(item_id=str(i)) for i in range(50)] + [fork(BUG)]
    table = tables.forks_table(result)
    assert len(table.rows) == tables.MAX_FORKS and table.rows[0][-1].startswith(BUG) and "11 more forks" in table.note


def test_losslessness_counts_outputs_and_leaves_synthetic_arms_out():
    result = make_result([PLAIN, arm("spec"), arm("fake", synthetic=True)])
    assert sentences.greedy(result) == (True, "12 of 12 greedy outputs are the baseline's, token for token.")
    result["losslessness"]["greedy"][0] |= {"greedy_identity_rate": 10 / 12, "forks": [fork(TIE), fork(BUG)]}
    result["losslessness"]["greedy"][1] |= {"greedy_identity_rate": 0.0, "forks": [fork(BUG)] * 12}
    fine, text = sentences.greedy(result)
    assert not fine and text.startswith("10 of 12") and "1 of 2 forks are numeric ties (below 0.050 nats)" in text
    (row,) = tables.greedy_table(result).rows
    assert row == ["greedy", "spec", "83.3%", "12", "100%", "12", "2", "1"]
    result["losslessness"]["greedy"][0] |= {"greedy_identity_rate": None, "forks": []}
    assert sentences.greedy(result)[0] is False and "had no token ids" in sentences.greedy(result)[1]
    assert sentences.greedy({}) is None


def test_only_tables_that_show_a_synthetic_arm_carry_its_note():
    result = make_result([PLAIN, arm("spec"), arm("fake", synthetic=True)])
    assert "fake has synthetic acceptance" in tables.latency_table(result).note
    assert "synthetic" not in tables.greedy_table(result).note


def test_accuracy_is_set_against_the_baseline_and_steps_against_the_memory():
    result = make_result(scored=True)
    row = next(row for row in result["accuracy"] if row["arm"] != result["arms"][0]["name"])
    place = {key: row[key] for key in ("cell", "suite", "arm")}
    result["accuracy_differences"] = [{**place, "difference": -0.031, "ci95": [-0.08, 0.02], "num_items": 20}]
    for point in result["cost_model"]:
        point["bandwidth_bound_step_sec"] = 0.0123
    text = render_markdown(result)
    page = render_report(result)
    assert "-3.1%" in text and "-3.1% [-8.0, 2.0]" in page
    assert "12.3 ms here: no step can be faster" in page
