"""``report.html``: one self-contained page, drawn from the result tree alone."""

from __future__ import annotations

from html import escape
from typing import Any

from specdec.evaluation import words
from specdec.evaluation.arms import PLAIN, SPEC
from specdec.evaluation.losslessness import TIE
from specdec.evaluation.plots import draw_plots

MAX_CLIENT_CPU_SHARE = 0.5
CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #20242a; font: 15px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.3; margin: 0 0 6px; font-weight: 650; }
h2 { font-size: 18px; margin: 40px 0 12px; font-weight: 650; }
.lede { color: #5b616b; margin: 0 0 24px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; }
.card, .panel { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: #5b616b; font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: 8px; } figure img { width: 100%; height: auto; }
.panel { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #5b616b; font-size: 13px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid #eef0f2; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.right td:not(:first-child), .right th:not(:first-child) { text-align: right; white-space: nowrap; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.warn { border-left: 4px solid #D55E00; } .calm { border-left: 4px solid #009E73; } .note { color: #5b616b; }
p { margin: 8px 0; }
"""


def render_report(result: dict[str, Any]) -> str:
    """The page as HTML text; every value is escaped, nothing is fetched from anywhere."""
    headline = words.headline(result)
    sections = [
        _cards(result),
        _warnings(result),
        _section("Plots, greedy decoding", _plots(result)),
        _section("Result", _table(result)),
        _section("Latency", _latency(result)),
        _section("Losslessness", _losslessness(result)),
        _section("Errors", _errors(result)),
        _section("How it was measured", _method(result)),
        _section("Provenance", _provenance(result["provenance"])),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(headline)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f'<body><main><h1>{_text(headline)}</h1><p class="lede">{_text(_lede(result))}</p>\n'
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _lede(result: dict[str, Any]) -> str:
    facts = result["provenance"]
    hardware = facts.get("hardware") or {}
    device = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('num_cores')} cores"
    return (
        f"{facts.get('num_prompts')} prompts, {facts.get('repeats')} repeats, "
        f"up to {facts.get('max_new_tokens')} tokens, "
        f"concurrency {facts.get('concurrency')}, K = {facts.get('num_speculative_tokens') or 'unknown'}, on {device}. "
        f"{facts.get('created')}"
    )


def _cards(result: dict[str, Any]) -> str:
    summary = result["summary"]
    cards = [
        (words.times(summary["speedup_median"]), f"speed-up, 95% interval {words.span(summary['speedup_ci95'])}"),
        (words.number(summary["acceptance_length"]), "acceptance length τ (tokens per verification)"),
        (words.millis(summary["spec_tpot_sec"]), f"TPOT, against {words.millis(summary['plain_tpot_sec'])} plain"),
        (words.percent(summary["greedy_identity_rate"]), "of greedy outputs identical to plain decode"),
    ]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in cards)
        + "</div>"
    )


def _warnings(result: dict[str, Any]) -> str:
    lines = list(result["notes"])
    if result["interrupted"]:
        lines.insert(0, "The run was interrupted: these are the requests that had ended by then.")
    share = result["client_cpu_share"]
    if share is not None and share > MAX_CLIENT_CPU_SHARE:
        lines.append(f"The client itself used {words.percent(share)} of a core: the timings may be its own.")
    if not lines:
        return ""
    return _section("Notes", '<div class="panel warn">' + "".join(f"<p>{_text(line)}</p>" for line in lines) + "</div>")


def _plots(result: dict[str, Any]) -> str:
    figures = "".join(
        f'<figure class="panel"><figcaption>{_text(title)}</figcaption><img src="{uri}" alt="{_text(text)}"></figure>'
        for title, uri, text in draw_plots(result)
    )
    return f'<div class="plots">{figures}</div>' if figures else ""


def _table(result: dict[str, Any]) -> str:
    return _grid(["", *result["modes"]], [[name, *cells] for name, cells in words.table_rows(result)])


def _latency(result: dict[str, Any]) -> str:
    names = {"ttft_sec": "TTFT", "tpot_sec": "TPOT", "e2e_sec": "end to end", "chunk_gap_sec": "gap between chunks"}
    columns = ("p50", "p90", "p99")
    rows = [
        [
            f"{name}, {mode}",
            *(" → ".join(words.millis(figures["arms"][arm][key][p]) for arm in (PLAIN, SPEC)) for p in columns),
        ]
        for mode, figures in result["modes"].items()
        for key, name in names.items()
    ]
    caption = (
        '<p class="note">A speculative chunk holds several tokens: its gaps are what a reader of the stream sees, '
        "and can't be compared with TPOT.</p>"
    )
    return _grid(["plain → speculative", *columns], rows) + caption


def _losslessness(result: dict[str, Any]) -> str:
    facts = result["losslessness"]
    if facts["greedy_identity_rate"] is None:
        return '<div class="panel warn"><p>Not checked: no prompt has token ids from both arms.</p></div>'
    forks = facts["forks"]
    ties = sum(fork["verdict"] == TIE for fork in forks)
    text = (
        f"Token for token, plain against speculative: {words.percent(facts['greedy_identity_rate'])} of "
        f"{facts['num_compared']} greedy outputs identical. Plain against itself (the noise floor): "
        f"{words.percent(facts['noise_floor_identity_rate'])} of {facts['num_noise_floor_compared']}. "
    )
    if forks:
        text += f"{len(forks)} forks, {ties} of them numeric ties (margin below {facts['tie_margin_nats']} nats)."
    block = f'<div class="panel {"calm" if ties == len(forks) else "warn"}"><p>{_text(text)}</p></div>'
    if not forks:
        return block
    rows = [
        [
            f"{fork['prompt_index']}: {fork['prompt_excerpt']}",
            str(fork["position"]),
            _token(fork["plain_token"], fork["plain_text"]),
            _token(fork["spec_token"], fork["spec_text"]),
            ("≥\N{NO-BREAK SPACE}" if fork["margin_is_lower_bound"] else "") + words.number(fork["margin_nats"], 4),
            f"{fork['verdict']}: {fork['why']}",
        ]
        for fork in forks
    ]
    return (
        block + "<p></p>" + _grid(["prompt", "token", "plain", "speculative", "nats", "verdict"], rows, numeric=False)
    )


def _token(token_id: int | None, text: str | None) -> str:
    return words.NOTHING if token_id is None else f"{token_id}" + ("" if text is None else f" {text!r}")


def _errors(result: dict[str, Any]) -> str:
    if not result["errors"]:
        return '<div class="panel calm"><p>Every request ended well.</p></div>'
    rows = [[kind, str(count)] for kind, count in sorted(result["errors"].items())]
    details = sorted({f"{row['error']}: {row['error_detail']}" for row in result["requests"] if row["error"]})[:5]
    return _grid(["kind", "requests"], rows) + "".join(
        f'<p class="note"><code>{_text(line)}</code></p>' for line in details
    )


def _method(result: dict[str, Any]) -> str:
    share = words.percent(result["client_cpu_share"])
    return (
        '<div class="panel"><p>The same prompts went to both servers in one run. Block by block the arms took turns, '
        "in random order, never at the same time; warm-up requests are not counted, and no request could reuse "
        "another's prefix cache. Tokens are the server's own count (usage), never chunks.</p>"
        "<p>TPOT is (end to end − first token) / (output tokens − 1). The speed-up of a prompt is the median TPOT over "
        "repeats, plain / speculative; the figure is the median over prompts, its interval a bootstrap over prompts. "
        "Acceptance is the difference of the server's counters before and after each mode. "
        f"{_text(f'The client used {share} of one core.')}</p></div>"
    )


def _provenance(facts: dict[str, Any]) -> str:
    flat: list[list[str]] = []
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        flat.append([key.replace("_", " "), text])
    return _grid(["", ""], flat, numeric=False)


def _grid(header: list[str], rows: list[list[str]], numeric: bool = True) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header) if any(header) else ""
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="panel"><table class="{"right" if numeric else ""}"><tr>{head}</tr>{body}</table></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _text(value: str) -> str:
    return escape(value, quote=True)
