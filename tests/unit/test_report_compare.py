"""Several runs on one page: `specdec report`."""

from __future__ import annotations

import copy
import html
import json
import re

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.evaluation import words
from specdec.evaluation.compare import list_differences, load_runs, render_comparison
from tests.result_extras import check_self_contained
from tests.result_tree import PLAIN, arm, make_result


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("specdec.evaluation.compare.draw_run_plots", lambda runs: [])


def test_runs_under_other_conditions_are_not_compared_silently(no_plots):
    base = make_result()
    assert list_differences([("a", base), ("b", copy.deepcopy(base))]) == []
    changes = {
        "target": lambda result: result["provenance"].update(target="r1-distill"),
        "hardware": lambda result: result["provenance"].update(hardware={"gpus": ["NVIDIA H100"]}),
        "prompts": lambda result: result["provenance"].update(prompts_sha256="other"),
        "load": lambda result: result["cells"][0].update(concurrency=8),
        "temperature or token budget": lambda result: result["cells"][0].update(temperature=0.6),
    }
    for what, change in changes.items():
        other = make_result(gain=0.7)
        change(other)
        (sentence,) = list_differences([("a", base), ("b", other), ("c", base)])
        assert sentence.startswith(f"The runs differ in {what}, so they can't be compared directly:")
        assert "(a, c)" in sentence and "(b)" in sentence
        assert html.escape(sentence) in render_comparison([("a", base), ("b", other), ("c", base)])


def test_a_comparison_has_a_row_a_run_and_its_plots():
    slow, fake = make_result(gain=0.7, scored=True), make_result([PLAIN, arm("fake", synthetic=True)])
    slow["notes"] = ["a note"]
    page = render_comparison([("first", make_result()), ("slow", slow), ("fake", fake)])
    check_self_contained(page)
    rows = re.findall(r"<tr><td class=\"name\">(.*?)</tr>", page)
    assert [row.split("<")[0] for row in rows] == ["first", "slow", "fake (synthetic)"]
    assert "eagle3" in rows[0] and "012345678" in rows[0] and " → " in rows[1] and "AMD EPYC, 2 cores" in rows[0]
    assert html.escape(words.headline(slow)) in page and "a note" in page and "can&#x27;t be compared" not in page
    assert page.count("<img") == 2 and f"fake has {words.SYNTHETIC}" in page


def test_runs_load_from_directories_and_files(tmp_path):
    for name in ("x/run", "y/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "result.json").write_text(json.dumps(make_result(num_items=1)))
    runs = load_runs([tmp_path / "x/run", tmp_path / "y/run/result.json"])
    assert [name for name, _ in runs] == ["x/run", "y/run"] and runs[1][1]["summary"]["num_requests"] == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist: name a directory that `specdec eval --out` wrote"),
        ("{", "not valid JSON"),
        ("[]", "no result of `specdec eval`"),
        ('{"summary": {}, "modes": {}}', "older specdec .*measure again with `specdec eval`"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        load_runs([tmp_path])
    with pytest.raises(ValueError, match="no run to compare"):
        load_runs([])


def test_the_command_writes_the_page_and_names_a_folder_without_a_result(no_plots, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(make_result()))
    out = tmp_path / "new" / "compared.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(out))
    assert all(name in out.read_text() for name in ("one", "two"))
    with pytest.raises(ValueError, match="three"):
        CliRunner().invoke(app, ["report", str(tmp_path / "three"), "--out", str(out)], catch_exceptions=False)
