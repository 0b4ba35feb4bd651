"""``result.json`` and ``timeline.png`` from what the other two wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.never_slower.steady import TEMPERATURES, WORK
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


def steady() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Points, and the worst ratios of the policy."""
    points, trained, useless = [], {}, {}
    for temperature, concurrency, arms in cells():
        speed = {name: arm["throughput_tok_per_sec"] for name, arm in arms.items()}
        for name, arm in arms.items():
            points.append(
                {
                    "arm": "auto" if name == "random" else name,
                    "head": {"plain": None, "random": "random"}.get(name, "trained"),
                    "concurrency": concurrency, "temperature": temperature, "tok_per_sec": speed[name],
                    "runs": arm["num_requests"], "acceptance_length": arm["acceptance"].get("acceptance_length"),
                    "fallback_share": arm["acceptance"].get("fallback_share"),
                }
            )  # fmt: skip
        fixed = {name: speed[name] for name in speed if name == "plain" or name.startswith("k")}
        label = f"c{concurrency} T{temperature:g}"
        trained[label] = speed["auto"] / max(fixed.values())
        useless[label] = speed["random"] / speed["plain"]
    return points, {
        "worst_ratio_trained": min(trained.values(), default=None), "ratio_trained": trained,
        "worst_ratio_random": min(useless.values(), default=None), "ratio_random": useless,
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
