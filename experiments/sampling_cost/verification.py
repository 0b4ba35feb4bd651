"""Sampled drafts verified by whole rows, as vLLM does, and by plain decode's draws, in slices of time.

    python experiments/sampling_cost/verification.py [HEAD_DIR [PASSES]]

Servers with K = 1 and K = 3, each both ways, beside plain decode, at T = 0.6 and the target's own top-p, 4, 16 and 32
requests at a time, without seeds, for which vLLM draws more slowly. Resumable (``rm -r runs/sampling_cost`` starts
anew). Writes verification.json beside this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.never_slower.steady import Load, measure_loads, server_config
from experiments.never_slower.verdict import done, ratio, speed
from specdec.evaluation.arm_specs import ArmSpec
from specdec.record import write_json_atomic

WORK, OUT = Path("runs/sampling_cost"), Path(__file__).with_name("verification.json")
CONCURRENCIES, WIDTHS = (4, 16, 32), (1, 3)
TEMPERATURE = 0.6
WHOLE_ROWS = {"vllm.worker-extension-cls": "experiments.sampling_cost.whole_rows.Worker"}


def load_path(concurrency: int) -> Path:
    """Where a load's measurement lies."""
    return WORK / f"c{concurrency}.json"


def run(head: str, passes: int) -> None:
    arms: dict[str, dict[str, str]] = {"plain": {}}
    for width in WIDTHS:
        arms[f"k{width}"] = {"head": head, "serve.policy": f"fixed:{width}"}
        arms[f"k{width}_whole_rows"] = arms[f"k{width}"] | WHOLE_ROWS
    specs = [ArmSpec(name=name, options=options) for name, options in arms.items()]
    loads = {
        load_path(concurrency): Load(concurrency=concurrency, temperature=TEMPERATURE, passes=passes, has_seeds=False)
        for concurrency in CONCURRENCIES
    }
    measure_loads(specs, server_config(num_seqs=max(CONCURRENCIES)), WORK, loads)


def summary() -> dict[str, object]:
    found: dict[str, object] = {}
    for concurrency in CONCURRENCIES:
        load = json.loads(load_path(concurrency).read_text())
        found[f"c{concurrency}"] = {
            "tok_per_sec": {name: speed(load, name) for name in load["work"]},
            "over_whole_rows": {f"k{width}": ratio(load, f"k{width}", f"k{width}_whole_rows") for width in WIDTHS},
            "over_plain": {name: ratio(load, name, "plain") for name in load["work"] if name != "plain"},
            "decode_step_ms": {
                name: 1e3 * done(load, name)["decode_sec"] / done(load, name)["num_steps"]
                for name in load["work"]
                if name != "plain"
            },
            "tok_per_draft": {
                name: 1 + done(load, name)["num_accepted_tokens"] / done(load, name)["num_drafts"]
                for name in load["work"]
                if name != "plain"
            },
        }
    return found


def main() -> None:
    head, passes = [*sys.argv[1:], *("runs/demo/head", "1")[len(sys.argv) - 1 :]][:2]
    run(head, int(passes))
    provenance = json.loads(load_path(CONCURRENCIES[0]).read_text())["provenance"]
    write_json_atomic(OUT, {"summary": summary(), "provenance": provenance})
    print(json.dumps(summary()))


if __name__ == "__main__":
    main()
