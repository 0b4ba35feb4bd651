"""``summary.md``: the result as a page of text, for people and pull requests."""

from __future__ import annotations

import re

from specdec.evaluation import sentences, tables, words
from specdec.evaluation.report import lede
from specdec.evaluation.tables import Table
from specdec.evaluation.tree import Tree, dig

_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")
_LIST_START = re.compile(r"^([-+]|\d+[.)])(?=\s)")


def render_markdown(result: Tree) -> str:
    """The page as Markdown text; no value can add markup, a table cell or a line of its own."""
    distribution = tables.distribution_table(result)
    blocks = [
        ("Notes", _bullets(sentences.warnings(result))),
        ("Result", _table(tables.main_table(result))),
        ("By condition", _table(tables.conditions_table(result), names=2)),
        ("By suite", _table(tables.suites_table(result), names=2)),
        ("Latency", _table(tables.latency_table(result), names=2)),
        ("Accuracy", _table(tables.accuracy_table(result), names=3)),
        ("Losslessness", _losslessness(result)),
        ("Sampled outputs", _table(distribution, names=2)),
        ("Cost model", _cost_model(result)),
        ("Cost in money", _table(tables.money_table(result), names=2)),
        ("Errors", _table(tables.errors_table(result))),
    ]
    lines = [f"**{text(words.headline(result))}**", text(lede(result))]
    lines += [f"## {heading}\n\n{body}" for heading, body in blocks if body]
    lines.append(text(_origin(result)))
    return "\n\n".join(block for block in lines if block) + "\n"


def _losslessness(result: Tree) -> str:
    greedy = sentences.greedy(result)
    return _join(text(greedy[1]), _table(tables.greedy_table(result), names=2)) if greedy else ""


def _cost_model(result: Tree) -> str:
    return _join(_bullets(sentences.break_even(result)), _table(tables.cost_model_table(result), names=2))


def text(value: str) -> str:
    """One line that Markdown shows as it is."""
    line = " ".join(str(value).split())
    line = _SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return _LIST_START.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", line)


def _table(content: Table | None, names: int = 1) -> str:
    """A pipe table; ``names`` leading columns are left-aligned, the others right when they are figures."""
    if content is None:
        return ""
    rule = [":--" if column < names or not content.numeric else "--:" for column in range(len(content.header))]
    rows = [[text(cell) for cell in row] for row in (content.header, *content.rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], rule, *rows[1:])]
    return _join("\n".join(lines), text(content.note))


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {text(line)}" for line in lines)


def _join(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block)


def _origin(result: Tree) -> str:
    sha = dig(result, "provenance", "git_sha")
    commit = f"commit {sha[:12]}{' with changes' if dig(result, 'provenance', 'git_dirty') else ''}" if sha else ""
    return f"Measured by specdec, {commit}." if commit else "Measured by specdec."
