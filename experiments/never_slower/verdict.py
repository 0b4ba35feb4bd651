"""``result.json`` and ``timeline.png`` from what the other two wrote.

A ratio is tokens a second over all turns of a load, with a bootstrap interval over the turns, in which all arms answer
the same requests one after the other. Its best fixed arm is the fastest of four that are measured with errors, which
flatters that arm: the ratio of the plain server to itself, measured as two arms, says how much a ratio can mean.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.never_slower.steady import AGAIN, TEMPERATURES, WORK
from specdec.metrics import bootstrap_ci95
from specdec.record import write_json_atomic

OUT = Path(__file__).with_name("result.json")


def cells() -> list[tuple[float, int, dict[str, Any]]]:
    """Temperature, concurrency, and the arms of each load."""
    found = []
    for temperature in TEMPERATURES:
        for path in sorted(WORK.glob(f"c*-t{temperature}/result.json")):
            result = json.loads(path.read_text())
            found += [(temperature, cell["concurrency"], cell["arms"]) for cell in result["cells"]]
    return sorted(found, key=lambda cell: cell[:2])


def best_table(max_num_seqs: int) -> str:
    """vLLM's table with the fixed K (0: plain) that was fastest at each greedy load."""
    best = {}
    for temperature, concurrency, arms in cells():
        if temperature == 0:
            speeds = {0: arms["plain"], **{int(name[1:]): arm for name, arm in arms.items() if name.startswith("k")}}
            best[concurrency] = max(speeds, key=lambda k: speeds[k]["throughput_tok_per_sec"])
    rows, first = [], 1
    for concurrency, width in sorted(best.items()):
        if first <= min(concurrency, max_num_seqs):
            rows.append(f"{first}-{min(concurrency, max_num_seqs)}:{width}")
            first = concurrency + 1
    return "/".join(rows)


def turns() -> dict[tuple[float, int], list[dict[str, tuple[int, float]]]]:
    """By temperature and concurrency, each turn's output tokens and busy seconds by arm."""
    found: dict[tuple[float, int], dict[tuple[int, int], dict[str, tuple[int, float]]]] = {}
    for temperature in TEMPERATURES:
        for path in WORK.glob(f"c*-t{temperature}/result.json"):
            result = json.loads(path.read_text())
            concurrency = {cell["name"]: cell["concurrency"] for cell in result["cells"]}
            for run in result["blocks"]:
                load = found.setdefault((temperature, concurrency[run["cell"]]), {})
                turn = load.setdefault((run["repeat"], run["block"]), {})
                turn[run["arm"]] = run["num_output_tokens"], run["busy_sec"]
    return {load: list(each.values()) for load, each in found.items()}


def ratio(load: list[dict[str, tuple[int, float]]], arm: str, other: str) -> list[float]:
    """Tokens a second of ``arm`` over ``other``'s, and its 95 % interval over turns (none of fewer than three)."""

    def of(drawn: Sequence[float]) -> float:
        speeds = []
        for name in (arm, other):
            taken = [load[int(i)][name] for i in drawn]
            speeds.append(sum(tokens for tokens, _ in taken) / sum(seconds for _, seconds in taken))
        return speeds[0] / speeds[1]

    every = range(len(load))
    return [of(every), *(bootstrap_ci95(every, of) or ())]


def steady() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Points, and the worst ratios of the policy."""
    points, found, by_load = [], {"trained": {}, "random": {}, "plain_again": {}}, turns()
    for temperature, concurrency, arms in cells():
        speed = {name: arm["throughput_tok_per_sec"] for name, arm in arms.items()}
        for name, arm in arms.items():
            acceptance = arm["acceptance"] or {}  # none: it does not draft
            points.append(
                {
                    "arm": "auto" if name == "random" else name,
                    "head": {"plain": None, AGAIN: None, "random": "random"}.get(name, "trained"),
                    "concurrency": concurrency, "temperature": temperature, "tok_per_sec": speed[name],
                    "runs": arm["num_requests"], "acceptance_length": acceptance.get("acceptance_length"),
                    "fallback_share": acceptance.get("fallback_share"),
                }
            )  # fmt: skip
        best = max((name for name in speed if name == "plain" or name.startswith("k")), key=lambda name: speed[name])
        label, load = f"c{concurrency} T{temperature:g}", by_load[temperature, concurrency]
        for key, arm, other in (
            ("trained", "auto", best),
            ("random", "random", "plain"),
            ("plain_again", AGAIN, "plain"),
        ):
            found[key][label] = {"against": other, "ratio": ratio(load, arm, other)}
    return points, {
        **{f"worst_ratio_{key}": min((each["ratio"][0] for each in loads.values()), default=None)
           for key, loads in found.items()},
        **{f"median_ratio_{key}": statistics.median(each["ratio"][0] for each in loads.values())
           for key, loads in found.items() if loads},
        "ratios": found,
    }  # fmt: skip


def shift() -> dict[str, Any]:
    """Speed of the three servers in each phase, and the policy's acceptance before and after."""
    speed: dict[str, dict[str, float]] = {}
    lengths: dict[str, float | None] = {}
    for phase in ("before", "changed", "after"):
        path = WORK / f"shift-{phase}/result.json"
        if not path.is_file():
            return {}
        result = json.loads(path.read_text())
        arms = result["cells"][0]["arms"]
        speed[phase] = {name: arm["throughput_tok_per_sec"] for name, arm in arms.items()}
        lengths[phase] = full_length(arms["auto"]["acceptance"]["conditional_rates"])
    return {
        "shift_tok_per_sec": speed,
        "shift_tau_before": lengths["before"], "shift_tau_changed": lengths["changed"],
        "shift_tau_after_resume": lengths["after"],
    }  # fmt: skip


def full_length(rates: list[float | None]) -> float | None:
    """τ of drafts of full width by the conditional rates: K changes, so plain averages do not compare."""
    if not rates or None in rates:
        return None
    length = reached = 1.0
    for rate in rates:
        reached *= rate or 0.0
        length += reached
    return length


def plot_timeline(path: Path) -> None:
    rows = [json.loads(line) for line in (WORK / "timeline.jsonl").read_text().splitlines()]
    start = rows[0]["at_sec"]
    seconds = [row["at_sec"] - start for row in rows]
    figure, axes = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    axes[0].step(seconds, [row["num_speculative_tokens"] for row in rows], where="post", color="#2563eb")
    axes[0].set_ylabel("K")
    axes[1].plot(seconds, [row["acceptance_length"] or float("nan") for row in rows], color="#059669")
    axes[1].set_ylabel("acceptance length,\nlast drafts")
    for key, color, label in (
        ("goodput_tok_per_sec", "#2563eb", "measured"), ("plain_tok_per_sec", "#9ca3af", "plain decode"),
    ):  # fmt: skip
        axes[2].plot(seconds, [row[key] or float("nan") for row in rows], color=color, label=label)
    axes[2].set_ylabel("tokens/s of decode")
    axes[2].set_xlabel("seconds; the server idles while the other two have their turn")
    axes[2].legend()
    for axis in axes:
        for previous, row, at in zip(rows, rows[1:], seconds[1:], strict=False):
            if row["phase"] != previous["phase"]:
                axis.axvline(at, color="#dc2626", linestyle=":")
    figure.savefig(path, dpi=120)


def main() -> None:
    points, summary = steady()
    summary |= shift()
    overhead = json.loads((WORK / "overhead.json").read_text()) if (WORK / "overhead.json").is_file() else {}
    provenance = json.loads(next(WORK.glob("c*-t0.0/result.json")).read_text())["provenance"]
    write_json_atomic(OUT, {"points": points, "summary": {**summary, **overhead}, "provenance": provenance})
    if (WORK / "timeline.jsonl").is_file():
        plot_timeline(OUT.with_name("timeline.png"))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
