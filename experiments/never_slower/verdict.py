"""``result.json`` and ``timeline.png`` from what the others wrote.

A ratio is that of two arms' tokens a second over a whole load. For its interval the load is cut into parts in which all
arms do the same share of the work, at nearly the same time, and parts are drawn with replacement. The best fixed arm is
the fastest of four that are measured with errors, which flatters it: so beside it stands the same ratio where one half
of the parts says which arm is best and the other half measures.

Servers that are started alike differ a little for as long as they run. So where loads were measured in several lives of
the servers, a load's figures are those of all lives together, and beside them stands each life's ratio. What is left of
it for the best policy there can be says ``control.py``.

The worst of twelve such ratios is mostly the unluckiest. What the policy does on the whole says their geometric mean,
and at how many loads it is surely slower: there the whole interval lies below ``ENOUGH``.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.never_slower.control import CONCURRENCIES, control_path
from experiments.never_slower.steady import LOADS, TEMPERATURES, WORK, load_path, shift_path, timeline_path
from specdec.metrics import bootstrap_ci95
from specdec.record import write_json_atomic

OUT = Path(__file__).with_name("result.json")
NUM_PARTS = 12
ENOUGH = 0.97  # of the speed that it is held against
WITH_INTERVAL = "trained", "random"  # of the ratios
FIXED = "k"  # how the names of the arms of a fixed K begin


def lives_of_loads() -> list[list[dict[str, Any]]]:
    """What was measured, by temperature and concurrency: each load with the servers of every life."""
    found = []
    for temperature in TEMPERATURES:
        for concurrency in LOADS:
            paths = (load_path(concurrency, temperature, life) for life in itertools.count())
            of_lives = itertools.takewhile(lambda path: path.parent.is_dir(), paths)
            found.append([json.loads(path.read_text()) for path in of_lives if path.is_file()])
    return [lives for lives in found if lives]


def loads() -> list[dict[str, Any]]:
    """What was measured, by temperature and concurrency, as if one server of each kind had done it all."""
    return [joined(lives) for lives in lives_of_loads()]


def joined(lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A load of several lives, as if one server of each kind had done it all."""
    work = joined_work([life["work"] for life in lives])
    return {**lives[0], "num_requests": sum(life["num_requests"] for life in lives), "work": work}


def joined_work(lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each arm's slices of several lives, one after the other, and its own figures added up."""
    work = {}
    for name in lives[0]:
        tokens, seconds = [0], [0.0]
        for life in lives:
            of_life = life[name]
            tokens, seconds = (
                [*sums, *(sums[-1] + each for each in of_life[key][1:])]
                for key, sums in (("num_tokens", tokens), ("seconds", seconds))
            )
        figures = [done({"work": life}, name) for life in lives]
        widths = [each.pop("steps_by_width") for each in figures]
        totals = {key: np.sum([each[key] for each in figures], axis=0).tolist() for key in figures[0]}
        histogram = {str(k): sum(each.get(k, 0) for each in widths) for k in sorted(set().union(*widths))}
        none = {"totals": {}, "k_histogram": {}}
        after = {"totals": totals, "k_histogram": histogram}
        work[name] = {"num_tokens": tokens, "seconds": seconds, "before": none, "after": after}
    return work


def part_seconds(work: dict[str, Any]) -> list[float]:
    """Seconds of each part of an arm's work."""
    tokens = np.linspace(0, work["num_tokens"][-1], NUM_PARTS + 1)
    return list(np.diff(np.interp(tokens, work["num_tokens"], work["seconds"])))


def speed(load: dict[str, Any], name: str, parts: Sequence[int] = range(NUM_PARTS)) -> float:
    """Tokens a second in these parts."""
    work = load["work"][name]
    seconds = part_seconds(work)
    return float(work["num_tokens"][-1] / NUM_PARTS * len(parts) / sum(seconds[i] for i in parts))


def ratio(load: dict[str, Any], arm: str, other: str, parts: Sequence[int] = range(NUM_PARTS)) -> list[float]:
    """Tokens a second of ``arm`` over ``other``'s in these parts, and its 95 % interval."""
    seconds = {name: part_seconds(load["work"][name]) for name in (arm, other)}
    more = load["work"][arm]["num_tokens"][-1] / load["work"][other]["num_tokens"][-1]

    def of(drawn: Sequence[float]) -> float:
        return more * sum(seconds[other][int(i)] for i in drawn) / sum(seconds[arm][int(i)] for i in drawn)

    return [of(parts), *(bootstrap_ci95(parts, of) or ())]


def best_fixed(load: dict[str, Any], parts: Sequence[int] = range(NUM_PARTS)) -> str:
    """The fastest of plain and every fixed K in these parts."""
    names = [name for name in load["work"] if name == "plain" or name.startswith(FIXED)]
    return max(names, key=lambda name: speed(load, name, parts))


def held_out(load: dict[str, Any], arm: str) -> float:
    """``arm`` over the best fixed one, which the other half of the parts named."""
    halves = [range(0, NUM_PARTS, 2), range(1, NUM_PARTS, 2)]
    found = [ratio(load, arm, best_fixed(load, halves[1 - i]), half)[0] for i, half in enumerate(halves)]
    return statistics.mean(found)


def done(load: dict[str, Any], name: str) -> dict[str, Any]:
    """What a server's own totals and its steps by K grew by."""
    before, after = (load["work"][name][when] for when in ("before", "after"))
    grown = {
        key: [n - (old[i] if (old := before["totals"].get(key)) else 0) for i, n in enumerate(value)]
        if isinstance(value, list)
        else value - (before["totals"].get(key) or 0)
        for key, value in after["totals"].items()
        if isinstance(value, (int, float, list))
    }
    widths = {int(k): n - before["k_histogram"].get(k, 0) for k, n in after["k_histogram"].items()}
    return grown | {"steps_by_width": widths}


def tokens_by_width(arms: Iterable[dict[str, Any]]) -> list[float]:
    """Tokens of a draft of 0, 1, ... tokens by the conditional rates of all these arms (``done``) together.

    A position that was never reached counts as never accepted.
    """
    all_arms = list(arms)
    accepted, reached = (
        np.sum([arm[f"{key}_per_position"] for arm in all_arms], axis=0) for key in ("accepted", "reached")
    )
    return [1.0, *(1 + np.cumsum(np.cumprod(accepted / np.maximum(reached, 1)))).tolist()]


def best_table(max_num_seqs: int) -> str:
    """vLLM's table with the fixed K (0: plain) that was fastest at each greedy load."""
    rows, first = [], 1
    for load in loads():
        concurrency = load["concurrency"]
        if load["temperature"] == 0 and first <= min(concurrency, max_num_seqs):
            best = best_fixed(load)
            rows.append(f"{first}-{min(concurrency, max_num_seqs)}:{0 if best == 'plain' else best[len(FIXED) :]}")
            first = concurrency + 1
    return "/".join(rows)


def point(load: dict[str, Any], name: str) -> dict[str, Any]:
    """One arm at one load."""
    grown = done(load, name)
    drafts, decode_sec = grown.get("num_drafts"), grown.get("decode_sec")
    return {
        "arm": "auto" if name == "random" else name,
        "head": {"plain": None, "random": "random"}.get(name, "trained"),
        "concurrency": load["concurrency"], "temperature": load["temperature"], "tok_per_sec": speed(load, name),
        "runs": len(load["work"][name]["seconds"]) - 1, "num_requests": load["num_requests"],
        "acceptance_length": 1 + grown["num_accepted_tokens"] / drafts if drafts else None,
        "fallback_share": grown["fallback_sec"] / decode_sec if decode_sec else None,
    }  # fmt: skip


def by_life(lives: Sequence[dict[str, Any]], arm: str, other: str) -> list[float]:
    """Tokens a second of ``arm`` over ``other``'s in each life."""
    return [speed(life, arm) / speed(life, other) for life in lives]


def steady() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Points, and the policy's ratios."""
    points, found = [], {key: {} for key in ("trained", "trained_held_out", "random")}
    for lives in lives_of_loads():
        load = joined(lives)
        points += [point(load, name) for name in load["work"]]
        label, best = f"c{load['concurrency']} T{load['temperature']:g}", best_fixed(load)
        found["trained"][label] = {
            "against": best, "ratio": ratio(load, "auto", best), "by_life": by_life(lives, "auto", best),
        }  # fmt: skip
        found["trained_held_out"][label] = {"ratio": [held_out(load, "auto")]}
        found["random"][label] = {
            "against": "plain", "ratio": ratio(load, "random", "plain"), "by_life": by_life(lives, "random", "plain"),
        }  # fmt: skip
    ratios = {key: [each["ratio"][0] for each in by_load.values()] for key, by_load in found.items()}
    slower = {key: sum(bool(max(each["ratio"]) < ENOUGH) for each in found[key].values()) for key in WITH_INTERVAL}
    return points, {
        **{f"worst_ratio_{key}": min(values) for key, values in ratios.items()},
        **{f"median_ratio_{key}": statistics.median(values) for key, values in ratios.items()},
        **{f"mean_ratio_{key}": statistics.geometric_mean(values) for key, values in ratios.items()},
        **{f"num_surely_slower_{key}": number for key, number in slower.items()},
        "ratios": found,
    }


def control() -> dict[str, Any]:
    """Of servers that all do the same: each one's speed over that of the fastest other."""
    found = {}
    for path in filter(Path.is_file, map(control_path, CONCURRENCIES)):
        load = json.loads(path.read_text())
        speeds = {name: speed(load, name) for name in load["work"]}
        fastest = {name: max(speeds[other] for other in speeds if other != name) for name in speeds}
        found[f"c{load['concurrency']}"] = [speeds[name] / fastest[name] for name in speeds]
    ratios = list(itertools.chain(*found.values()))
    if not ratios:
        return {}
    return {
        "worst_ratio_control": min(ratios), "mean_ratio_control": statistics.geometric_mean(ratios),
        "control_ratios": found,
    }  # fmt: skip


def shift_lives() -> list[dict[str, Any]]:
    """What was measured of the load that changes, with the servers of every life."""
    paths = itertools.takewhile(Path.is_file, map(shift_path, itertools.count()))
    return [json.loads(path.read_text()) for path in paths]


def shift() -> dict[str, Any]:
    """Speed of the three servers in each phase, and the policy's acceptance before and after, of all lives together."""
    lives = [life["phases"] for life in shift_lives()]
    if not lives:
        return {}
    phases = {name: {"work": joined_work([life[name] for life in lives])} for name in lives[0]}
    against = {
        other: {name: ratio(load, "auto", other) for name, load in phases.items()} for other in ("plain", "table")
    }
    together = {
        other: sum(each["work"][other]["seconds"][-1] for each in phases.values())
        / sum(each["work"]["auto"]["seconds"][-1] for each in phases.values())
        for other in ("plain", "table")
    }
    # By the conditional rates: K changes, so plain averages do not compare.
    lengths = {name: tokens_by_width([done(load, "auto")])[-1] for name, load in phases.items()}
    return {
        "shift_tok_per_sec": {name: {arm: speed(load, arm) for arm in load["work"]} for name, load in phases.items()},
        "shift_num_lives": len(lives), "shift_auto_against": against, "shift_auto_against_together": together,
        "shift_auto_against_table_by_life": {
            name: by_life([{"work": life[name]} for life in lives], "auto", "table") for name in phases
        },
        "shift_tau_before": lengths["before"], "shift_tau_changed": lengths["changed"],
        "shift_tau_after_resume": lengths["after"],
    }  # fmt: skip


def plot_timeline(timeline: Path, path: Path) -> None:
    rows = [json.loads(line) for line in timeline.read_text().splitlines()]
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
    axes[2].set_xlabel("seconds of decoding")
    axes[2].legend()
    for axis in axes:
        for previous, row, at in zip(rows, rows[1:], seconds[1:], strict=False):
            if row["phase"] != previous["phase"]:
                axis.axvline(at, color="#dc2626", linestyle=":")
    figure.savefig(path, dpi=120)


def common_provenance(measured: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The first load's, with every commit that a load was measured at, and whether any of them had changes."""
    found = [life["provenance"] for lives in measured for life in lives]
    trees = sorted({each["git_sha"] for each in found})
    return {**found[0], "git_sha": " ".join(trees), "git_dirty": any(each["git_dirty"] for each in found)}


def main() -> None:
    points, summary = steady()
    summary |= shift() | control()
    overhead = json.loads((WORK / "overhead.json").read_text()) if (WORK / "overhead.json").is_file() else {}
    measured = [*lives_of_loads(), shift_lives()]
    summary = {"num_lives": max(map(len, lives_of_loads())), **summary, **overhead}
    write_json_atomic(OUT, {"points": points, "summary": summary, "provenance": common_provenance(measured)})
    if timeline_path(0).is_file():
        plot_timeline(timeline_path(0), OUT.with_name("timeline.png"))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
