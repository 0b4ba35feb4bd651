"""What README.md says exists: its commands, their options, its Makefile targets and its file tree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specdec.config import load_config

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TREE_HEADING = "## Files"


def fenced_blocks(text: str) -> list[str]:
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str, program: str) -> list[str]:
    """Commands of ``program`` in the fenced blocks, continuation lines joined, prompts and comments cut."""
    lines = [line for block in fenced_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    stripped = [line.strip().removeprefix("$ ").partition(" #")[0].strip() for line in lines]
    return [line for line in stripped if re.match(rf"{program}(\s|$)", line)]


README_TEXT = README.read_text()
SPECDEC_COMMANDS = shell_commands(README_TEXT, "specdec")
MAKE_COMMANDS = shell_commands(README_TEXT, "make")


def unknown_words(command: str) -> list[str]:
    """Subcommands and options of a ``specdec`` command line that the CLI doesn't have."""
    import typer

    from specdec.cli import app  # not at the top: a broken command line must not hide the other findings

    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    words = words[: words.index("--")] if "--" in words else words
    if not words:
        return []
    if words[0].startswith("-"):
        known = {"--help", *(option for p in group.params for option in (*p.opts, *p.secondary_opts))}
        return [word for word in words if word.startswith("-") and word not in known]
    subcommands = group.commands  # type: ignore[attr-defined]
    if words[0] not in subcommands:
        return [words[0]]
    params = subcommands[words[0]].params
    known = {"--help", *(option for p in params for option in (*p.opts, *p.secondary_opts))}
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    return [option for option in options if option not in known]


def tree_paths(text: str) -> list[str]:
    """Paths of the file tree: two spaces an indent, then a name, then its phrase."""
    [block] = fenced_blocks(text.partition(TREE_HEADING)[2].partition("\n## ")[0])
    paths: list[str] = []
    parents: list[str] = []
    for line in block.splitlines():
        matched = re.match(r"^((?:  )*)(\S+)\s{2,}\S", line)
        assert matched, f"no name and phrase in the tree's line {line!r}"
        depth = len(matched[1]) // 2
        parents = [*parents[:depth], matched[2].rstrip("/")]
        paths.append("/".join(parents))
    return paths


def test_readme_has_commands_to_check():
    assert {shlex.split(command)[1] for command in SPECDEC_COMMANDS} >= {"env", "prepare", "train", "serve", "eval"}
    assert {"make demo", "make test"} <= set(MAKE_COMMANDS)


@pytest.mark.parametrize("command", SPECDEC_COMMANDS)
def test_specdec_command_exists(command: str):
    assert unknown_words(command) == []


@pytest.mark.parametrize("command", SPECDEC_COMMANDS)
def test_settings_of_a_command_exist(command: str):
    words = shlex.split(command)
    load_config(None, [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_unknown_subcommand_and_option_are_caught():
    assert unknown_words("specdec trian --target t") == ["trian"]
    assert unknown_words("specdec train --taget t --out=x") == ["--taget"]
    assert unknown_words("specdec serve --target t -- --any-vllm-flag 1") == []


@pytest.mark.parametrize("command", MAKE_COMMANDS)
def test_make_target_exists(command: str):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in shlex.split(command)[1:] if "=" not in word} <= targets


def test_file_tree_names_what_exists():
    paths = tree_paths(README_TEXT)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_file_tree_names_every_module():
    """A folder's ``__init__.py`` is spoken for by the folder's own line."""
    named = set(tree_paths(README_TEXT))
    modules = [
        str(path.relative_to(ROOT) if path.name != "__init__.py" else path.parent.relative_to(ROOT))
        for room in ("specdec", "draft_training", "serving")
        for path in (ROOT / room).rglob("*.py")
        if not path.name.startswith("test_")
    ]
    assert sorted(set(modules) - named) == []


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README_TEXT)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("document", [README, *sorted((ROOT / "experiments").rglob("*.md"))], ids=str)
def test_no_path_of_somebodys_machine(document: Path):
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users)/\S+", document.read_text()) == []
