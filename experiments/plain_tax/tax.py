"""What K = 0 costs against a server without a head, all in slices of the same time (``never_slower/slices.py``).

A second plain server says how far two servers that do the same differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.never_slower.steady import Load, measure_loads, server_config
from specdec.evaluation.arm_specs import ArmSpec

WORK = Path("runs/plain_tax")
PASSES = {1: 2, 4: 1, 16: 1, 32: 1}  # requests at a time, and passes over the load's requests


def load_path(concurrency: int) -> Path:
    """Where a load's measurement lies."""
    return WORK / f"tax-c{concurrency}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    off = {"head": str(parser.parse_args().head), "serve.policy": "off"}
    every_step = off | {"vllm.worker-extension-cls": "experiments.plain_tax.every_step.Worker"}
    arms: dict[str, dict[str, str]] = {"plain": {}, "plain_again": {}, "every_step": every_step, "put_off": off}
    specs = [ArmSpec(name=name, options=options) for name, options in arms.items()]
    loads = {load_path(concurrency): Load(concurrency=concurrency, passes=n) for concurrency, n in PASSES.items()}
    measure_loads(specs, server_config(num_seqs=max(PASSES)), WORK, loads)


if __name__ == "__main__":
    main()
