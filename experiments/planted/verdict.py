"""``python experiments/planted/verdict.py RUN_DIR``: which planted faults did ``specdec eval`` find?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from specdec.record import write_json_atomic

OUT = Path(__file__).with_name("result.json")


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Detection by the intervals and the p-values of the result, nothing else."""
    greedy = result["cells"][0]["comparisons"]
    lossy = {row["arm"]: row["lossy"] for row in result["losslessness"]["distribution"]}
    p_values = {row["arm"]: row["p_value"] for row in result["losslessness"]["distribution"]}
    identity = {row["arm"]: row["greedy_identity_rate"] for row in result["losslessness"]["greedy"]}
    return {
        "detected": {
            "slowdown": greedy["slow"]["speedup_ci95"][1] < 1,
            "acceptance": greedy["drafts"]["acceptance_ratio_ci95"][1] < 1,
            "sampler": lossy["sampler"],
        },
        "aa_ci95": greedy["same"]["speedup_ci95"],
        "false_alarms": {
            "slowdown": [arm for arm in ("same", "drafts") if _excludes_one(greedy[arm]["speedup_ci95"], arm)],
            "acceptance": [arm for arm in ("same", "slow") if _excludes_one(greedy[arm]["acceptance_ratio_ci95"], arm)],
            "sampler": [arm for arm in ("same", "slow", "drafts") if lossy[arm]],
        },
        "speedup": {arm: [each["speedup_median"], *each["speedup_ci95"]] for arm, each in greedy.items()},
        "acceptance_ratio": {
            arm: [each["acceptance_ratio_mean"], *each["acceptance_ratio_ci95"]] for arm, each in greedy.items()
        },
        "two_sample_p_value": p_values,
        "greedy_identity_rate": identity,
        "notes": result["notes"],
        "provenance": result["provenance"],
    }


def _excludes_one(interval: list[float], arm: str) -> bool:
    # Lost drafts cost time as well: there, only "faster" would be false.
    return interval[0] > 1 or (interval[1] < 1 and arm != "drafts")


if __name__ == "__main__":
    found = verdict(json.loads((Path(sys.argv[1]) / "result.json").read_text()))
    write_json_atomic(OUT, found)
    print(json.dumps({key: found[key] for key in ("detected", "aa_ci95", "false_alarms")}))
