"""What a user hears who asks for Ray where it can't be had."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from draft_training.completions import CompletionLog
from draft_training.prepare import prepare
from draft_training.ray_engines import _device_of, generate_with_ray
from specdec.config import load_config
from specdec.targets import Target

TARGET = Target(name="t", path=Path(), config={"max_position_embeddings": 64})


def test_without_ray_its_install_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    traces = load_config(None, ["traces.ray_engines=2"]).traces
    with pytest.raises(ValueError, match=r"pip install 'specdec\[ray\]'"):
        generate_with_ray(TARGET, "auto", traces, {"a": [1]}, CompletionLog(tmp_path / "log.jsonl"))


def test_servers_or_ray_but_not_both(tmp_path: Path):
    with pytest.raises(ValueError, match="not both"):
        prepare(load_config(None, ["traces.ray_engines=2", "traces.endpoints=[http://a]"]), tmp_path)


def test_engines_go_where_the_cluster_has_gpus_and_are_never_more_than_it_holds():
    device, environment = _device_of({"GPU": 4.0, "CPU": 64.0}, 4)
    assert (device.kind, device.dtype) == ("cuda", "bfloat16")
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    device, environment = _device_of({"CPU": 2.0}, 2)
    assert device.kind == "cpu" and "VLLM_CPU_KVCACHE_SPACE" in environment
    with pytest.raises(ValueError, match=r"ray_engines=5, but the Ray cluster has 4 GPUs"):
        _device_of({"GPU": 4.0, "CPU": 64.0}, 5)
    with pytest.raises(ValueError, match=r"ray_engines=3, but the Ray cluster has 2 CPUs"):
        _device_of({"CPU": 2.0}, 3)
