"""The report, drawn from made-up result trees of every shape."""

from __future__ import annotations

import base64
import copy
import functools
import html
import re
import xml.etree.ElementTree

import pytest
from matplotlib.figure import Figure

from specdec.evaluation import tree, words
from specdec.evaluation.compare import render_comparison
from specdec.evaluation.losslessness import BUG
from specdec.evaluation.markdown import render_markdown
from specdec.evaluation.plots import draw_plots
from specdec.evaluation.plots.accuracy import draw_scaling
from specdec.evaluation.plots.load import draw_speedup_by_load
from specdec.evaluation.plots.runs import draw_run_plots
from specdec.evaluation.report import render_report
from tests.result_extras import check_self_contained, distribution, fork, rich_result
from tests.result_tree import PLAIN, arm, cell, make_result, sweep

ALWAYS = {"Speed-up by suite", "Speed-up of each task", "Output length", "Latency, request by request"}
SPECULATIVE = {
    "Draft tokens accepted, by position", "Acceptance length along the output",
    "Acceptance length in thinking and answer", "Predicted and measured speed-up",
}  # fmt: skip
LOADS = {"Speed-up by condition", "Throughput against speed for one user", "Speed-up under load"}
WIDTHS, SCALING = "Draft width K, and fallback to plain decode", "Accuracy against cost"
HOSTILE = "<script>alert('1')</script> a|b *c* _d_ `e` $f_{g$ \"h\" & ![i](http://j)"


@pytest.fixture(scope="module")
def rich():
    return rich_result()


@pytest.fixture(scope="module")
def rich_page(rich):
    return render_report(rich)


@pytest.fixture
def no_saving(monkeypatch):
    """Lay out the plots without writing SVG, which takes most of the time."""
    monkeypatch.setattr("specdec.evaluation.plots.style._data_uri", lambda figure: "data:,")


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("specdec.evaluation.report.draw_plots", lambda result: [])
    monkeypatch.setattr("specdec.evaluation.compare.draw_run_plots", lambda runs: [])


def titles(result) -> set[str]:
    return {plot.title for plot in draw_plots(result)}


def everything(result) -> list[str]:
    """All that a result is turned into."""
    words.columns(result)
    words.table_rows(result)
    return [render_report(result), render_markdown(result), render_comparison([("one", result), ("two", result)])]


def test_the_page_is_self_contained_and_says_everything(rich, rich_page):
    check_self_contained(rich_page)
    text = html.unescape(re.sub(r"<[^>]+>", " ", rich_page))
    for heading in (
        "Notes", "Plots", "Result", "By condition", "By suite", "Latency", "Accuracy", "Losslessness", "Cost model",
        "Cost in money", "Errors", "How it was measured", "Provenance",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in rich_page
    for fact in (
        words.headline(rich), "1 of 1,920 requests failed", "above concurrency 9.7, stop speculating",
        "71% of a core", "The client used 71.0% of one core", "it woke 4.00 ms late",
        "the machine was not quiet", "divergence: bug?", "≥ 2.5000", "(end) 0.000 → 0.100", "differs",
        "timeout: no answer in 600 s", "At 2.49 an hour", "0123456789abcdef", "c36c202ee42166ce", "AMD EPYC",
    ):  # fmt: skip
        assert fact in text, fact


def test_every_plot_is_an_svg_with_a_text_instead(rich_page):
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)">', rich_page)
    assert len(images) == rich_page.count("<img") == len(ALWAYS | SPECULATIVE | LOADS) + 2
    for data, text in images:
        root = xml.etree.ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg") and len(text) > 20
        assert not [
            link for element in root.iter() for key, link in element.items() if "href" in key and link[0] != "#"
        ]


def test_a_plot_appears_exactly_when_its_data_does(no_saving, rich):
    assert titles(rich) == ALWAYS | SPECULATIVE | LOADS | {WIDTHS, SCALING}
    assert titles(make_result()) == ALWAYS | SPECULATIVE
    plain = make_result([PLAIN, arm("plain again", None)])
    assert titles(plain) == ALWAYS
    assert titles(make_result(num_items=0)) == set()
    assert titles(make_result(varies=True)) == ALWAYS | SPECULATIVE | {WIDTHS}
    loads = make_result(cells=sweep(1, 4))
    assert titles(loads) == ALWAYS | SPECULATIVE | LOADS
    assert titles(make_result(cells=[cell(), cell("sampled", None)])) == ALWAYS | SPECULATIVE | {
        "Speed-up by condition"
    }
    rates = [cell(f"r{rate}", arrival="poisson", rate=rate, concurrency=64) for rate in (0.5, 2.0)]
    assert titles(make_result(cells=rates)) == ALWAYS | SPECULATIVE | LOADS
    budgets = [cell(f"b{budget}", 0.6, thinking_budget=budget) for budget in (64, 256)]
    assert SCALING in titles(make_result(cells=budgets, scored=True))
    assert SCALING not in titles(make_result(cells=budgets))
    assert SCALING not in titles(make_result(cells=sweep(1, 4), scored=True))


def test_accuracy_is_drawn_over_what_an_answer_costs():
    budgets = [cell(f"b{b} n{n}", 0.6, thinking_budget=b, num_samples=n) for b in (64, 256) for n in (1, 4)]
    for price, axis_label in ((None, "machine seconds a question"), (3.6, "cost of 1,000 questions")):  # 1 a second
        result = make_result(cells=budgets, scored=True, price=price)
        figure = Figure()
        caption = draw_scaling(figure, (result, result["cells"]))
        (axes,) = figure.axes
        assert caption and "thinking budgets" in caption.note and axes.get_xlabel() == axis_label
        singles = {container.get_label(): list(container[0].get_xdata()) for container in axes.containers}
        rows = [row for row in result["accuracy"] if row["num_samples"] == 4]
        for name in ("plain", "spec"):
            spent = [row["sec_per_answer"] for row in rows if row["arm"] == name]
            assert singles[name] == pytest.approx(spent) and len(spent) == 2


def test_a_ceiling_belongs_to_its_own_sweep():
    loads = [cell(f"c{c} b{b}", concurrency=c, thinking_budget=b) for b in (64, 256) for c in (1, 4)]
    result = make_result(cells=loads)
    for group in tree.sweeps(result):
        figure = Figure()
        assert draw_speedup_by_load(figure, (result, group))
        (ceiling,) = (line for line in figure.axes[0].lines if line.get_linestyle() == ":")
        assert len(ceiling.get_xdata()) == 2


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("per_position_rates", "Draft tokens accepted, by position"),
        ("by_output_position", "Acceptance length along the output"),
        ("by_span", "Acceptance length in thinking and answer"),
    ],
)
def test_acceptance_that_is_unknown_is_not_drawn(no_saving, key, gone):
    result = make_result()
    result["cells"][0]["arms"]["spec"]["acceptance"][key] = None
    assert titles(result) == (ALWAYS | SPECULATIVE) - {gone}


def test_the_first_visible_token_has_a_panel_only_where_something_is_hidden(no_saving):
    def medians(result):
        return next(plot.text for plot in draw_plots(result) if plot.title.startswith("Latency"))

    assert "visible" in medians(make_result(thinks=True)) and "visible" not in medians(make_result())


def test_plots_survive_awkward_values(no_saving):
    result = make_result([PLAIN, arm(HOSTILE)], num_items=1)
    result["requests"][0] |= {"ttft_sec": 0.0}
    result["requests"][1] |= {"ttft_sec": 900.0, "error": "timeout"}
    assert titles(result) >= ALWAYS
    result["cells"][0]["comparisons"][HOSTILE]["speedup_ci95"] = None
    assert titles(result) >= ALWAYS


def test_another_arm_does_not_speak_in_the_headline(no_plots):
    result = make_result([PLAIN, arm("good"), arm("bad")])
    result["losslessness"]["greedy"][1]["forks"] = [fork(BUG)]
    assert words.headline(result).startswith("Arm good runs") and "LOSSLESS" not in words.headline(result)
    assert "bad: not lossless, 1 greedy fork" in render_report(result)


def test_a_synthetic_arm_is_called_so_everywhere(rich, rich_page):
    shown = re.sub(r"<img [^>]+>", "", rich_page.split('<section id="provenance"')[0])
    named = re.findall(r"surface.{20}", shown)
    allowed = ("surface (synthetic)", "surface has synthetic acc", "surface, no claim")
    assert len(named) > 30 and all(text.startswith(allowed) for text in named)
    for figure in re.findall(r"<figure.*?</figure>", rich_page, re.DOTALL):
        assert ("surface" in figure) == (f"surface has {words.SYNTHETIC}" in figure)
    first = make_result([PLAIN, arm("fake", synthetic=True)])
    first["losslessness"]["greedy"][0]["forks"] = [fork(BUG)]
    assert words.headline(first).startswith(f"fake ({words.SYNTHETIC}) runs")
    assert "identical" not in words.headline(first) and "LOSSLESS" not in words.headline(first)
    assert f"fake has {words.SYNTHETIC}" in render_markdown(first) and "bug?" not in render_markdown(first)


def leaves(node, path=()):
    """Paths of a tree, of lists only the first element."""
    children = node.items() if isinstance(node, dict) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from leaves(value, (*path, key))


NAMES = ("name", "arm", "suite", "cell")  # what figures are found by


def cut(result, path):
    result = copy.deepcopy(result)
    node = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = None
    return result


def test_anything_may_be_missing(no_plots):
    full = make_result(thinks=True, scored=True, varies=True, price=1.0, cells=sweep(1, 4), num_items=3)
    full["losslessness"]["greedy"][0]["forks"] = [fork()]
    full["losslessness"]["distribution"] = [distribution()]
    for path in leaves(full):
        if path[-1] not in (*NAMES, 0) and path[:1] != ("requests",):
            everything(cut(full, path))
    for empty in ({}, dict.fromkeys(full), {**dict.fromkeys(full), "cells": []}):
        page, text, _ = everything(empty)
        assert "Nothing to conclude" in page and "Nothing to conclude" in text


def test_plots_draw_whatever_is_left(no_saving):
    full = make_result(thinks=True, varies=True, cells=sweep(1, 4), num_items=2)
    pair, figures = ("cells", 0, "comparisons", "spec"), ("cells", 0, "arms", "spec")
    acceptance = (*figures, "acceptance")
    groups = [
        [(*pair, "speedup_median"), acceptance],
        [(*pair, "speedup_ci95"), (*figures, "tpot_sec"), (*acceptance, "conditional_rates")],
        [(*pair, "speedup_by_task"), (*figures, "throughput_tok_per_sec"), (*acceptance, "draft_width_histogram")],
        [(*acceptance, "fallback_share"), (*acceptance, "by_output_position", 0, "end"), ("summary",)],
        [("cost_model", 0, "ceiling_speedup"), ("cells", 0, "suites"), ("cells", 0, "concurrency"), ("requests",)],
        [("cost_model",), ("break_even",), ("accuracy",), ("arms",)],
    ]
    for paths in groups:
        draw_plots(functools.reduce(cut, paths, full))
    assert draw_plots({}) == [] and draw_run_plots([("none", {})]) == []


def test_every_text_is_escaped(no_plots):
    result = make_result([PLAIN, arm(HOSTILE)], [cell(HOSTILE)], [HOSTILE], num_items=3, scored=True, price=1.0)
    result["notes"] = [HOSTILE]
    result["errors"] = {HOSTILE: 2}
    result["requests"][0] |= {"error": HOSTILE, "error_detail": HOSTILE}
    result["provenance"] |= {"target": HOSTILE, "command": HOSTILE, "head": {"name": HOSTILE}}
    result["losslessness"]["greedy"][0]["forks"] = [fork(why=HOSTILE, plain_text=HOSTILE, prompt_excerpt=HOSTILE)]
    result["losslessness"]["distribution"] = [distribution(HOSTILE)]
    page, text, comparison = everything(result)
    for markup in (page, comparison):
        check_self_contained(markup)
        assert html.escape(HOSTILE, quote=True) in markup
    assert "<script" not in text and not re.search(r"(?<!\\)\*c", text) and not re.search(r"(?<!\\)!?\[i", text)
    assert text.count("\n**") == 0 and text.startswith("**")


def test_hostile_names_are_drawn(no_saving):
    result = make_result([PLAIN, arm(HOSTILE), arm("_hidden")], [cell(HOSTILE), cell("_b", concurrency=2)], [HOSTILE])
    assert titles(result) == ALWAYS | SPECULATIVE | LOADS
