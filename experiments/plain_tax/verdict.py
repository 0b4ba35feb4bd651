"""``result.json``: the tax of K = 0 by way of fallback, and acceptance with a fallback in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specdec.record import write_json_atomic

OUT, WORK = Path(__file__).with_name("result.json"), Path("runs/plain_tax")


def main() -> None:
    tax, resume = (json.loads((WORK / name / "result.json").read_text()) for name in ("tax", "resume"))
    found: dict[str, Any] = {"speed_against_plain": {}, "acceptance": {}}
    for cell in tax["cells"]:
        found["speed_against_plain"][cell["name"]] = {
            arm: [each["speedup_median"], *(each["speedup_ci95"] or ())] for arm, each in cell["comparisons"].items()
        }
    (cell,) = resume["cells"]
    for name, arm in cell["arms"].items():
        acceptance = arm["acceptance"]
        keys = ("acceptance_length", "conditional_rates", "num_drafts", "draft_width_histogram")
        found["acceptance"][name] = {key: acceptance[key] for key in keys}
    found["greedy_identity_rate"] = {
        row["arm"]: row["greedy_identity_rate"] for result in (tax, resume) for row in result["losslessness"]["greedy"]
    }
    found["provenance"] = resume["provenance"]
    write_json_atomic(OUT, found)
    print(json.dumps({key: found[key] for key in ("speed_against_plain", "acceptance")}))


if __name__ == "__main__":
    main()
