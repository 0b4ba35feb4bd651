"""``result.json``: the tax of K = 0 by way of fallback, and acceptance with a fallback in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.never_slower.verdict import ratio
from experiments.plain_tax.tax import PASSES, WORK, load_path
from specdec.record import write_json_atomic

OUT = Path(__file__).with_name("result.json")


def main() -> None:
    resume = json.loads((WORK / "resume" / "result.json").read_text())
    found: dict[str, Any] = {"speed_against_plain": {}, "acceptance": {}}
    for concurrency in PASSES:
        load = json.loads(load_path(concurrency).read_text())
        found["speed_against_plain"][f"c{concurrency}"] = {
            arm: ratio(load, arm, "plain") for arm in load["work"] if arm != "plain"
        }
    (cell,) = resume["cells"]
    for name, arm in cell["arms"].items():
        acceptance = arm["acceptance"]
        keys = ("acceptance_length", "conditional_rates", "num_drafts", "draft_width_histogram")
        found["acceptance"][name] = {key: acceptance[key] for key in keys}
    found["greedy_identity_rate"] = {
        row["arm"]: row["greedy_identity_rate"] for row in resume["losslessness"]["greedy"]
    }
    found["provenance"] = resume["provenance"]
    write_json_atomic(OUT, found)
    print(json.dumps({key: found[key] for key in ("speed_against_plain", "acceptance")}))


if __name__ == "__main__":
    main()
