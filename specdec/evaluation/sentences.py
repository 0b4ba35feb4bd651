"""What the result says in sentences: warnings, losslessness, and when to stop speculating."""

from __future__ import annotations

from specdec.evaluation import tree, words
from specdec.evaluation.tree import Tree


def warnings(result: Tree) -> list[str]:
    """All that a reader must know before trusting a figure; usually empty."""
    lines = []
    if result.get("interrupted"):
        lines.append("The run was interrupted: these are the requests that had ended by then.")
    lines += [f"{words.arm_label(result, arm)}: not lossless, {sentence}." for arm, sentence in words.alarms(result)]
    lines += [str(note) for note in result.get("notes") or []]
    if result.get("timings_in_doubt") and not result.get("notes"):
        lines.append("The timings are in doubt.")
    rows = result.get("requests") or []
    failed = sum(bool(row.get("error")) for row in rows)
    if failed:
        lines.append(f"{words.count(failed)} of {words.count(len(rows))} requests failed, see Errors.")
    synthetic = words.synthetic_note(result, tree.arm_names(result))
    return [*lines, synthetic] if synthetic else lines


def break_even(result: Tree) -> list[str]:
    """From which load on each arm should stop speculating, as far as the sweep tells."""
    sentences = []
    for entry in result.get("break_even") or []:
        load, verdict = entry.get("concurrency"), str(entry.get("verdict") or "no break-even found").rstrip(".")
        text = verdict if load is None else f"above concurrency {words.plain(load)}, stop speculating"
        where = f", {entry['cell_group']}" if entry.get("cell_group") else ""
        sentences.append(f"{words.arm_label(result, str(entry.get('arm')))}{where}: {text}.")
    return sentences


def greedy(result: Tree) -> tuple[bool, str] | None:
    """``(fine, sentence)`` on the greedy outputs of every arm against the baseline's; None when none was looked at."""
    entries = tree.greedy_rows(result)
    if not entries:
        return None
    checked = [entry for entry in entries if entry.get("greedy_identity_rate") is not None]
    compared = sum(entry.get("num_compared") or 0 for entry in checked)
    same = round(sum(entry["greedy_identity_rate"] * (entry.get("num_compared") or 0) for entry in checked))
    text = f"{words.count(same)} of {words.count(compared)} greedy outputs are the baseline's, token for token."
    forks = [fork for entry in checked for fork in entry.get("forks") or []]
    num_ties = sum(map(words.is_tie, forks))
    if forks:
        margin = words.significant(checked[0].get("tie_margin_nats"), 2)
        text += f" {words.count(num_ties)} of {words.count(len(forks))} forks are numeric ties (below {margin} nats)."
    if len(checked) < len(entries):
        missing = words.count(len(entries) - len(checked))
        text += f" {missing} of {words.count(len(entries))} comparisons had no token ids from both arms."
    return num_ties == len(forks) and len(checked) == len(entries), text
