"""What the result says in sentences: warnings, losslessness, and when to stop speculating."""

from __future__ import annotations

from specdec.evaluation import tree, words
from specdec.evaluation.tree import Tree, dig

MAX_CLIENT_CPU_SHARE = 0.5  # of one core: above it the client may be what is timed


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
    share = result.get("client_cpu_share")
    if share is not None and share > MAX_CLIENT_CPU_SHARE:
        lines.append(f"The client itself used {words.percent(share)} of a core: the timings may be its own.")
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


def greedy(result: Tree) -> list[tuple[bool, str]]:
    """``(fine, sentence)`` of each arm and cell whose greedy outputs were compared with the baseline's."""
    sentences = []
    for entry in dig(result, "losslessness", "greedy") or []:
        name = f"{words.arm_label(result, str(entry.get('arm')))}, {entry.get('cell')}"
        if tree.is_synthetic(result, entry.get("arm")):
            sentences.append((True, f"{name}: not judged, dictated acceptance takes wrong tokens on purpose."))
        elif entry.get("greedy_identity_rate") is None:
            sentences.append((False, f"{name}: not checked, no task has token ids from both arms."))
        else:
            sentences.append((all(map(words.is_tie, entry.get("forks") or [])), f"{name}: {_identity(entry)}."))
    return sentences


def _identity(entry: Tree) -> str:
    text = (
        f"{words.percent(entry['greedy_identity_rate'])} of {words.count(entry.get('num_compared'))} greedy outputs "
        "are the baseline's, token for token"
    )
    if entry.get("noise_floor_identity_rate") is not None:
        text += (
            f"; the baseline repeats itself in {words.percent(entry['noise_floor_identity_rate'])} of "
            f"{words.count(entry.get('num_noise_floor_compared'))} (the noise floor)"
        )
    forks = entry.get("forks") or []
    if forks:
        num_ties = sum(map(words.is_tie, forks))
        margin = words.significant(entry.get("tie_margin_nats"))
        text += f"; {words.count(num_ties)} of {words.count(len(forks))} forks are numeric ties (below {margin} nats)"
    return text
