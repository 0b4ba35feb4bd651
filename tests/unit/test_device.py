"""The device without torch: dtype by instruction set, and the libraries to preload."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from specdec import device
from specdec.device import Device, detect_device, preload_value, vllm_environment


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx512f", "avx512_bf16"}, "bfloat16"),
        ({"amx_bf16"}, "bfloat16"),
        ({"asimd", "bf16"}, "bfloat16"),
        ({"avx2", "avx512f"}, "float32"),
        (set(), "float32"),
    ],
)
def test_cpu_dtype_follows_its_instructions(monkeypatch, flags, dtype):
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    monkeypatch.setattr(device, "cpu_flags", lambda: flags)
    found = detect_device()
    assert (found.kind, found.dtype) == ("cpu", dtype)
    assert found.core_ids == tuple(sorted(found.core_ids))
    assert found.core_ids


def test_driver_tool_alone_is_no_gpu(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert detect_device().kind == "cpu"
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert detect_device() == Device(kind="cuda", core_ids=detect_device().core_ids, native_bf16=True)


def test_openmp_is_this_environments(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert device.find_openmp() is None
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert device.find_openmp() == library


def test_preload_puts_ours_first_and_names_nothing_twice(monkeypatch):
    monkeypatch.setattr(device, "find_openmp", lambda: Path("/env/lib/libiomp5.so"))
    monkeypatch.setattr(device, "find_tcmalloc", lambda: None)
    assert preload_value() == "/env/lib/libiomp5.so"
    assert preload_value("/other/libiomp5.so:/my/lib.so") == "/env/lib/libiomp5.so:/my/lib.so"
    assert preload_value(preload_value("/my/lib.so")) == preload_value("/my/lib.so")
    monkeypatch.setattr(device, "find_openmp", lambda: None)
    assert preload_value("/my/lib.so") == "/my/lib.so"


def test_a_cpu_server_uses_the_compile_cache_that_works(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path))
    cpu = Device(kind="cpu", core_ids=(0, 1), native_bf16=False)
    environment = vllm_environment(cpu, existing={})
    assert environment["VLLM_USE_AOT_COMPILE"] == "0"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    mine = {"TORCHINDUCTOR_CACHE_DIR": "/mine", "VLLM_USE_AOT_COMPILE": "1", "GLIBC_TUNABLES": "glibc.malloc.check=1"}
    assert not mine.keys() & set(vllm_environment(cpu, existing=mine))


def test_a_cpu_server_s_memory_comes_in_huge_pages():
    """A child with its environment allocates what a weight would take, and asks Linux which pages it got."""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("this C library takes no such wish")
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    program = (
        "import ctypes\nblock = ctypes.create_string_buffer(64 << 20)\nctypes.memset(block, 1, len(block))\n"
        "rows = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "print(next(row.split()[1] for row in rows if row.startswith('AnonHugePages')))"
    )
    wish = vllm_environment(Device(kind="cpu", core_ids=(0, 1), native_bf16=False), existing={})["GLIBC_TUNABLES"]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    answer = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"GLIBC_TUNABLES": wish}, capture_output=True, text=True
    )
    assert int(answer.stdout) >= 32 << 10, answer.stderr


@pytest.mark.parametrize(("native_bf16", "settled"), [(True, "bfloat16"), (False, "float32")])
def test_auto_becomes_this_device_s_dtype_and_nothing_else_does(native_bf16, settled):
    device = Device(kind="cpu", core_ids=(0,), native_bf16=native_bf16)
    assert [device.settled(dtype) for dtype in ("auto", "float16")] == [settled, "float16"]
