"""What the best policy that can be would show: servers that all do the same, each held against the fastest other one.

Servers that are started alike differ a little for as long as they run, and the policy's server is held against the
fastest of four others. So four servers with one fixed K answer the same requests in slices, as in ``steady.py``, and
``verdict.py`` puts their ratios beside the policy's. Some ten minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.never_slower import steady
from experiments.never_slower.steady import Load, measure_loads, server_config
from specdec.evaluation.arm_specs import ArmSpec

NUM_SERVERS = 4  # each against three: the policy is held against four, plain and three fixed K
FIXED_K = 2
CONCURRENCIES = (1, 8, 32)


def control_path(concurrency: int) -> Path:
    """Where a load's measurement lies."""
    return steady.WORK / "control" / f"c{concurrency}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    same = {"head": str(options.head), "serve.policy": f"fixed:{FIXED_K}"}
    specs = [ArmSpec(name=f"server{i + 1}", options=same) for i in range(NUM_SERVERS)]
    loads = {
        control_path(concurrency): Load(concurrency=concurrency, passes=options.passes, mean_tokens=options.tokens)
        for concurrency in CONCURRENCIES
    }
    measure_loads(specs, server_config(max(CONCURRENCIES)), steady.WORK / "control", loads)


if __name__ == "__main__":
    main()
