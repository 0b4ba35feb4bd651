"""The device without torch: which dtype it computes natively, and the environment vLLM wants on it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specdec.targets import cache_dir

NATIVE_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # x86 AVX-512, x86 AMX, arm64


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What this process may use."""

    kind: str  # "cuda" | "cpu"
    core_ids: tuple[int, ...]
    native_bf16: bool

    @property
    def dtype(self) -> str:
        """The dtype to compute a bf16 checkpoint in.

        A CPU without bf16 instructions emulates each multiplication: a batch then costs its size times
        one token, so verifying K + 1 tokens at once could never pay. float32 holds every bf16 weight exactly.
        """
        return "bfloat16" if self.native_bf16 else "float32"

    def settled(self, dtype: str) -> str:
        """The dtype that was asked for, or in place of "auto" this device's."""
        return self.dtype if dtype == "auto" else dtype


def detect_device() -> Device:
    """CUDA when the NVIDIA driver is there, else this CPU."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = tuple(sorted(allowed))
    if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists():
        return Device(kind="cuda", core_ids=cores, native_bf16=True)
    return Device(kind="cpu", core_ids=cores, native_bf16=bool(cpu_flags() & set(NATIVE_BF16_FLAGS)))


def process_rank() -> int:
    """Which process this is of a run that torchrun or accelerate started as several; 0: the first, or the only one."""
    return int(os.environ.get("RANK", "0")) if num_processes() > 1 else 0


def num_processes() -> int:
    """How many processes torchrun or accelerate started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shards_weights(parallel: str) -> bool:
    """Whether each process keeps a part of the weights: by ``train.parallel``, or as accelerate's launcher asks."""
    asked_by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return num_processes() > 1 and (parallel == "fsdp" or asked_by_launcher)


def cpu_flags() -> set[str]:
    """Instruction-set flags as Linux names them; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    for line in cpuinfo.read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.partition(":")[2].split())
    return set()


def find_openmp() -> Path | None:
    """Intel's OpenMP runtime of this environment (wheel intel-openmp), which vLLM's CPU kernels want preloaded."""
    return next(iter(sorted(Path(sys.prefix, "lib").glob("libiomp5.so"))), None)


def find_tcmalloc() -> Path | None:
    """A tcmalloc of the system or of the vLLM wheel."""
    patterns = [
        (Path("/usr"), "lib*/libtcmalloc_minimal.so.4"),
        (Path("/usr/lib"), "*-linux-gnu/libtcmalloc_minimal.so.4"),
        (Path(sys.prefix, "lib"), "python*/site-packages/vllm/libs/libtcmalloc*.so*"),
    ]
    return next((hit for root, pattern in patterns for hit in sorted(root.glob(pattern))), None)


def preload_value(existing: str = "") -> str:
    """``LD_PRELOAD`` with what this machine has of OpenMP and tcmalloc, before what was there."""
    wanted = [str(lib) for lib in (find_tcmalloc(), find_openmp()) if lib is not None]
    kept = [entry for entry in existing.split(":") if entry and Path(entry).name not in {Path(w).name for w in wanted}]
    return ":".join(wanted + kept)


def vllm_environment(
    device: Device, existing: Mapping[str, str], threads_bind: str = "auto", kv_cache_gib: int | None = 2
) -> dict[str, str]:
    """Environment variables for a vLLM process on ``device``; ``existing`` is what it inherits.

    ``kv_cache_gib``: None where a flag says it, which vLLM's variable, of whole GiB, would overrule.

    ``auto`` pins to every core: vLLM's own binding keeps one back, which on few cores is worth more in the matrix
    products, and unpinned threads made plain decode a quarter slower.

    vLLM 0.32's ahead-of-time compile cache does not load on CPU, and while it is on the compiler's own cache is
    not used: every start would compile for two minutes. Without it the second start takes a fifth of that.

    glibc is told to ask for huge pages (2 MiB), which Linux may give on demand alone: a decode step reads all weights,
    and plain decode is 1 to 2 % faster with fewer pages to look up (``experiments/huge_pages``).
    """
    if device.kind != "cpu":
        return {}
    if threads_bind == "auto":
        threads_bind = existing.get("VLLM_CPU_OMP_THREADS_BIND") or core_ranges(device.core_ids)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": threads_bind}
    if kv_cache_gib is not None or "VLLM_CPU_KVCACHE_SPACE" in existing:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib or "")
    defaults = {
        "VLLM_USE_AOT_COMPILE": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "compiled"),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    environment |= {name: value for name, value in defaults.items() if name not in existing}
    preload = preload_value(existing.get("LD_PRELOAD", ""))
    return environment | ({"LD_PRELOAD": preload} if preload else {})


def core_ranges(core_ids: tuple[int, ...]) -> str:
    """Core ids in the short form that vLLM reads: (0, 1, 2, 5) gives ``0-2,5``."""
    spans: list[list[int]] = []
    for core in sorted(core_ids):
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
