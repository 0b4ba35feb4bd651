"""The house holds: who may import whom, what importing costs, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("specdec", "draft_training", "serving")
LAZY_IMPORTERS = {Path("specdec/cli.py"), Path("specdec/demo.py")}  # they may reach the neighbours inside functions
HEAVY = ("torch", "transformers", "vllm")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def python_files(*folders: str) -> list[Path]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in paths if "__pycache__" not in path.parts)


SOURCES = python_files(*ROOMS)
ALL_FILES = python_files(*ROOMS, "tests", "experiments", ".ci")


@dataclass(frozen=True)
class Edge:
    """One import: ``source`` names ``module`` (dotted), inside a function or at the top."""

    source: Path
    module: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.module}"

    def reaches(self, package: str) -> bool:
        return self.module == package or self.module.startswith(f"{package}.")


def edges_of(source: Path, text: str) -> Iterator[Edge]:
    """Every import of a file, dynamic ones with a literal name included."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Edge]:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(source.with_suffix("").parts[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        yield from (Edge(source, name, getattr(node, "lineno", 0), lazy) for name in names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(text), False)


def violations(edges: list[Edge]) -> list[str]:
    """Edges that the house forbids."""
    bad = []
    for edge in edges:
        room, *inner = edge.source.parts
        others = set(ROOMS) - {"specdec", room}
        neighbours = [other for other in others if edge.reaches(other)]
        if neighbours and not (edge.source in LAZY_IMPORTERS and edge.lazy):
            bad.append(str(edge))
        if room == "draft_training" and inner[0] == "heads" and len(inner) > 2:
            parts = edge.module.split(".")
            own = f"draft_training.heads.{inner[1]}"
            siblings = {p.name for p in (ROOT / "draft_training/heads").iterdir() if p.is_dir()}
            if parts[:2] == ["draft_training", "heads"] and len(parts) > 2 and not edge.reaches(own):
                bad += [str(edge)] if parts[2] in siblings else []
    return bad


def all_edges() -> list[Edge]:
    return [edge for source in SOURCES for edge in edges_of(source, (ROOT / source).read_text())]


def test_rooms_import_only_what_they_may():
    edges = all_edges()
    assert len(edges) > 50
    assert violations(edges) == []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("serving/x.py", "import draft_training.trainer"),
        ("serving/x.py", "def f():\n    from draft_training import trainer"),
        ("draft_training/x.py", "from serving.launch import plan_server"),
        ("draft_training/x.py", "import importlib\nimportlib.import_module('serving.launch')"),
        ("specdec/x.py", "def f():\n    import serving"),
        ("specdec/cli.py", "import serving"),
        ("specdec/evaluation/x.py", "def f():\n    import draft_training"),
        ("draft_training/heads/other/x.py", "from draft_training.heads.eagle3 import model"),
        ("draft_training/heads/other/x.py", "from draft_training.heads import eagle3"),
    ],
)
def test_forbidden_import_is_caught(source: str, text: str):
    assert violations(list(edges_of(Path(source), text))) != []


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("specdec/cli.py", "def f():\n    import serving"),
        ("serving/x.py", "from specdec.config import RunConfig"),
        ("draft_training/heads/eagle3/x.py", "from draft_training.heads.eagle3 import model"),
        ("draft_training/heads/eagle3/x.py", "from draft_training.heads import HeadSpec"),
    ],
)
def test_allowed_import_passes(source: str, text: str):
    assert violations(list(edges_of(Path(source), text))) == []


def loaded_after(code: str) -> set[str]:
    check = f"import sys\n{code}\nsys.stderr.write('loaded:' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("loaded:")[2].split()) & set(HEAVY)


def test_importing_the_words_loads_no_framework():
    assert loaded_after("import specdec, specdec.config, specdec.chat.session, specdec.evaluation, serving") == set()


@pytest.mark.parametrize("module", [".".join(path.with_suffix("").parts) for path in python_files("serving")])
def test_serving_loads_no_framework(module: str):
    assert loaded_after(f"import {module.removesuffix('.__init__')}") == set()


def test_help_loads_no_framework():
    code = """
sys.argv = ["specdec", "--help"]
from specdec.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
"""
    assert loaded_after(code) == set()


def test_no_file_is_a_drawer_for_everything():
    vague = {"utils.py", "common.py", "helpers.py", "util.py", "misc.py"}
    assert [str(path) for path in ALL_FILES if path.name in vague] == []


def test_files_and_functions_stay_small():
    too_long = []
    for path in ALL_FILES:
        text = (ROOT / path).read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            too_long.append(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    assert too_long == []
