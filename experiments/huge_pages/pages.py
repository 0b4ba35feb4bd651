"""Servers whose memory comes in huge pages beside servers whose memory does not, in slices of the same time.

The kinds differ in ``GLIBC_TUNABLES`` alone: where it is set already, ``specdec serve`` leaves it as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

from experiments.never_slower.slices import DEV_MODE
from experiments.never_slower.steady import Load, Started, measure_started, server_config
from experiments.never_slower.verdict import ratio, speed
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import open_arms
from specdec.record import provenance, write_json_atomic

WORK, OUT = Path("runs/huge_pages"), Path(__file__).with_name("result.json")
VARIABLE = "GLIBC_TUNABLES"
KINDS = {"small": "", "huge": "glibc.malloc.hugetlb=1"}
NUM_SERVERS = 3  # of each kind
CONCURRENCIES = (1, 8, 32)


def servers(options: dict[str, str], folder: Path, stack: contextlib.ExitStack) -> Started:
    """Both kinds, by name."""
    os.environ[DEV_MODE] = "1"
    started: Started = {}
    for kind, wish in KINDS.items():
        os.environ[VARIABLE] = wish
        specs = [ArmSpec(name=f"{kind}_{i}", options=options) for i in range(NUM_SERVERS)]
        started |= stack.enter_context(open_arms(specs, server_config(max(CONCURRENCIES)), folder))
    os.environ.pop(VARIABLE)
    return started


def verdict(load: dict[str, Any]) -> dict[str, Any]:
    """Each server's tokens a second, how far those of a kind lie apart, and the ratio of each pair's speeds."""
    speeds = {name: speed(load, name) for name in load["work"]}
    kinds = {kind: [value for name, value in speeds.items() if name.startswith(kind)] for kind in KINDS}
    pairs = [ratio(load, f"huge_{i}", f"small_{i}") for i in range(NUM_SERVERS)]
    return {
        "concurrency": load["concurrency"],
        "tok_per_sec": speeds,
        "spread": {kind: max(values) / min(values) - 1 for kind, values in kinds.items()},
        "huge_over_small": statistics.median(kinds["huge"]) / statistics.median(kinds["small"]),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=1)
    args = parser.parse_args()
    arms = {"plain": {}, "k3": {"head": str(args.head), "serve.policy": "fixed:3"}}
    found = {}
    for name, options in arms.items():
        folder = WORK / name
        loads = {folder / f"c{each}.json": Load(concurrency=each, passes=args.passes) for each in CONCURRENCIES}
        left = {path: load for path, load in loads.items() if not path.is_file()}
        if left:
            with contextlib.ExitStack() as stack:
                measure_started(servers(options, folder, stack), left)
        found[name] = [verdict(json.loads(path.read_text())) for path in loads]
    write_json_atomic(OUT, {"loads": found, "provenance": provenance()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
