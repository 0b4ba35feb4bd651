"""What K = 0 costs against a server without a head, all in slices of the same time (``never_slower/slices.py``).

A second plain server says how far two servers that do the same differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

from experiments.never_slower.slices import DEV_MODE
from experiments.never_slower.steady import measure_load, server_config
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import open_arms
from specdec.record import write_json_atomic

WORK = Path("runs/plain_tax")
PASSES = {1: 2, 4: 1, 16: 1, 32: 1}  # requests at a time, and passes over the load's requests
TOKENS = 64


def load_path(concurrency: int) -> Path:
    """Where a load's measurement lies."""
    return WORK / f"tax-c{concurrency}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    off = {"head": str(parser.parse_args().head), "serve.policy": "off"}
    every_step = off | {"vllm.worker-extension-cls": "experiments.plain_tax.every_step.Worker"}
    arms: dict[str, dict[str, str]] = {"plain": {}, "plain_again": {}, "every_step": every_step, "put_off": off}
    left = [concurrency for concurrency in PASSES if not load_path(concurrency).is_file()]
    if not left:
        return
    os.environ[DEV_MODE] = "1"
    specs = [ArmSpec(name=name, options=options) for name, options in arms.items()]
    with open_arms(specs, server_config(num_seqs=max(PASSES)), WORK) as started:
        for i, concurrency in enumerate(left):
            print(json.dumps({"load": i + 1, "of": len(left)}), flush=True)
            found = asyncio.run(measure_load(started, concurrency, 0.0, PASSES[concurrency], TOKENS))
            write_json_atomic(load_path(concurrency), found)


if __name__ == "__main__":
    main()
