"""Provenance and atomic JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specdec import record


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "deep" / "result.json"
    record.write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        record.write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]  # no temporary file stays
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_hash_is_order_sensitive_and_unambiguous():
    assert record.text_sha256("ab", "c") != record.text_sha256("a", "bc")
    assert record.text_sha256("a", "b") != record.text_sha256("b", "a")
    assert record.text_sha256("τ") == record.text_sha256("τ")
    assert len(record.text_sha256()) == 64


def test_versions_leave_absent_packages_out(monkeypatch):
    monkeypatch.setattr(record, "RECORDED_PACKAGES", ("pyyaml", "no-such-package-anywhere"))
    versions = record.package_versions()
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert "pyyaml" in versions
    assert "no-such-package-anywhere" not in versions


def test_provenance_holds_its_facts_and_serialises(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/specdec", "eval", "--target", "t"])
    facts = record.provenance(target="t", temperature=0.0)
    assert facts["command"] == "specdec eval --target t"
    assert (facts["target"], facts["temperature"]) == ("t", 0.0)
    assert {"created", "git_sha", "git_dirty", "versions", "hardware"} <= set(facts)
    assert facts["hardware"]["num_cores"] >= 1
    assert facts["hardware"]["memory_bytes"] > 1 << 20
    assert json.loads(json.dumps(facts)) == facts


def test_git_state_outside_a_checkout_is_none(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert record.git_state() == {"git_sha": None, "git_dirty": None}
    assert record.hardware()["gpus"] == []
