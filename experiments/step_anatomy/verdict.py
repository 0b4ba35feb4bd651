"""``result.json`` and ``anatomy.png``: milliseconds of each part of a step, median over the steps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.step_anatomy.clocks import PERIOD
from specdec.record import write_json_atomic

OUT, WORK = Path(__file__).with_name("result.json"), Path("runs/step_anatomy")
SERVERS = ("plain", "uncut", "spec")
BETWEEN = "between the processes, and outside of steps"
WAITS = ("engine: wait for sampling", "engine: wait for drafts", "engine: wait for the forward, and the rest")


def medians_ms(name: str) -> dict[str, dict[str, float]]:
    """By kind of step, each part's median; parts that a step did not have count as zero."""
    found = {}
    for key, steps in json.loads((WORK / f"clocks/{name}.json").read_text()).items():
        if len(steps) < 30:
            continue
        parts = sorted({part for step in steps for part in step})
        found[key] = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in steps) for part in parts}
    return found


def anatomy(server: str) -> dict[str, dict[str, float]]:
    """Parts of both processes; what is left of a step's period lies between them."""
    engine, worker = medians_ms(f"engine-{server}"), medians_ms(f"worker-{server}")
    found = {}
    for key in sorted(set(engine) & set(worker)):
        own = {part: ms for part, ms in engine[key].items() if part not in (PERIOD, *WAITS)}
        work = {part: ms for part, ms in worker[key].items() if part != PERIOD}
        period = engine[key][PERIOD]
        left = period - sum(own.values()) - sum(work.values())
        found[key] = {**work, **own, BETWEEN: left, PERIOD: period}
    return found


def plot(parts: dict[str, Any], path: Path) -> None:
    names = [(server, key) for server in parts for key in parts[server]]
    labels = sorted({part for server in parts for each in parts[server].values() for part in each} - {PERIOD})
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.6 * len(names)), layout="constrained")
    left = [0.0] * len(names)
    colors = plt.get_cmap("tab20").colors
    for number, label in enumerate(labels):
        widths = [max(0.0, parts[server][key].get(label, 0.0)) for server, key in names]
        axis.barh([f"{s}, {k}" for s, k in names], widths, left=left, label=label, color=colors[number % 20])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("milliseconds a step (medians)")
    axis.invert_yaxis()
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.25))
    figure.savefig(path, dpi=120)


def main() -> None:
    result = json.loads((WORK / "result.json").read_text())
    parts = {server: anatomy(server) for server in SERVERS}
    write_json_atomic(OUT, {"milliseconds": parts, "provenance": result["provenance"]})
    plot(parts, OUT.with_name("anatomy.png"))
    for server, kinds in parts.items():
        for key, each in kinds.items():
            print(f"{server}, {key}: {each[PERIOD]:.1f} ms")
            for part, ms in sorted(each.items(), key=lambda item: -item[1]):
                print(f"  {ms:7.2f}  {part}")


if __name__ == "__main__":
    main()
