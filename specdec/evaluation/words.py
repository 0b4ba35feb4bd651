"""Figures as people read them: the same words in the terminal's table and in the report."""

from __future__ import annotations

from typing import Any

from specdec.evaluation.arms import PLAIN, SPEC

NOTHING = "–"


def headline(result: dict[str, Any]) -> str:
    """One sentence that says what was found; honest about slow-downs and about nothing."""
    summary, provenance = result["summary"], result["provenance"]
    target = provenance.get("target") or "the target"
    if summary["speedup_median"] is None:
        return f"Nothing to conclude about {target}: no prompt has a timing without error in both arms."
    ratio, interval = summary["speedup_median"], summary["speedup_ci95"]
    spread = f" (95% interval {interval[0]:.2f}–{interval[1]:.2f})" if interval else " (one prompt: no interval)"
    if interval and interval[0] <= 1 <= interval[1]:
        verdict = f"makes no clear difference to {target}: {ratio:.2f}×{spread} in time per output token"
    else:
        verdict = f"runs {target} {ratio:.2f}× as fast as plain{'' if ratio >= 1 else ', so slower'}{spread}"
    parts = [f"Speculative decoding {verdict}"]
    if summary["acceptance_length"] is not None:
        parts.append(f"{summary['acceptance_length']:.2f} tokens per verification")
    if summary["greedy_identity_rate"] is not None:
        parts.append(f"{percent(summary['greedy_identity_rate'])} of greedy outputs identical")
    doubt = " The timings are in doubt, see the notes." if result["timings_in_doubt"] else ""
    return "; ".join(parts) + "." + doubt


def table_rows(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """``(figure, one cell a mode)`` of the result table; the columns are ``list(result["modes"])``."""
    modes = list(result["modes"].values())
    rows: list[tuple[str, list[str]]] = [
        ("acceptance length τ", [number(m["acceptance_length"]) for m in modes]),
        ("τ measured by training", [number(m["trained_acceptance_length"]) for m in modes]),
        ("acceptance rate α", [percent(m["acceptance_rate"]) for m in modes]),
        ("accepted by position", [rates(m["per_position_rates"]) for m in modes]),
        ("conditional on the one before", [rates(m["conditional_rates"]) for m in modes]),
        ("TPOT plain", [millis(m["plain_tpot_sec"]) for m in modes]),
        ("TPOT speculative", [millis(m["spec_tpot_sec"]) for m in modes]),
        ("speed-up (median of prompts)", [times(m["speedup_median"]) for m in modes]),
        ("  95% interval", [span(m["speedup_ci95"]) for m in modes]),
        ("plain TPOT between repeats", [percent(m["tpot_repeat_spread"]) for m in modes]),
        ("greedy identity rate", [percent(m["greedy_identity_rate"]) for m in modes]),
        ("tokens/s plain → speculative", [_throughputs(m) for m in modes]),
        ("requests (errors)", [f"{m['num_requests']} ({sum(m['errors'].values())})" for m in modes]),
    ]
    return [(name, cells) for name, cells in rows if any(cell != NOTHING for cell in cells)]


def _throughputs(mode: dict[str, Any]) -> str:
    return " → ".join(number(mode["arms"][arm]["throughput_tok_per_sec"], 1) for arm in (PLAIN, SPEC))


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}%"


def millis(value: float | None) -> str:
    """Seconds in milliseconds."""
    return NOTHING if value is None else f"{1e3 * value:.2f} ms"


def times(value: float | None) -> str:
    """A ratio."""
    return NOTHING if value is None else f"{value:.3f}×"


def span(value: list[float] | None) -> str:
    """An interval."""
    return NOTHING if value is None else f"{value[0]:.3f} – {value[1]:.3f}"


def rates(values: list[float | None]) -> str:
    """Fractions, first position first."""
    return " / ".join(number(value) for value in values) or NOTHING
