"""``specdec eval`` from end to end: check, serve, measure, write ``result.json`` and ``report.html``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.config import RunConfig
from specdec.device import detect_device
from specdec.evaluation import words
from specdec.evaluation.acceptance import trained_acceptance
from specdec.evaluation.arms import PLAIN, SPEC, Arm, given_arms, started_arms
from specdec.evaluation.losslessness import check_losslessness
from specdec.evaluation.measure import Measurement, measure, num_requests
from specdec.evaluation.report import render_report
from specdec.evaluation.summary import build_result
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts
from specdec.progress import progress_bar
from specdec.record import provenance, text_sha256, write_json_atomic
from specdec.targets import resolve_target
from specdec.traces import read_prompts


def evaluate(
    config: RunConfig,
    target_name: str,
    head_dir: Path | None,
    prompts: Path,
    out_dir: Path,
    plain_url: str | None = None,
    spec_url: str | None = None,
) -> dict[str, Any]:
    """Measure plain against speculative decoding and write ``out_dir/result.json`` and ``out_dir/report.html``.

    The arms are started from ``target_name`` and ``head_dir``, unless two URLs of running servers are given.
    Ctrl-C ends the measurement early; what was measured is written, with ``interrupted`` set.

    Returns:
        The result tree (see ``summary.build_result``).

    Raises:
        ValueError: bad prompts, a head of another target, a server that does not start. The message says what to do.
    """
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, name=target_name))
    console = Console(stderr=True)
    texts = read_prompts(prompts)[: config.eval.num_prompts]
    manifest, sampling = _check_head(config, head_dir)
    with _arms(config, head_dir, out_dir, plain_url, spec_url, console) as arms:
        with progress_bar("measuring", num_requests(config.eval, len(texts))) as advance:
            measurement = measure(config.eval, arms, texts, lambda mode: advance(1, mode))
        losslessness = check_losslessness(measurement, arms, _dtype(config, arms[PLAIN]))
    served_k = measurement.num_speculative_tokens or arms[SPEC].num_speculative_tokens
    trained = _trained(measurement, manifest, served_k)
    facts = provenance(
        target=target_name,
        head=_head_facts(head_dir, manifest),
        num_speculative_tokens=served_k,
        temperature={"greedy": 0.0, **({"sampled": "the server's default"} if config.eval.sampled else {})},
        default_sampling=sampling,
        prompts=prompts.name,
        prompts_sha256=text_sha256(*texts),
        num_prompts=len(texts),
        servers={name: "started here" if plain_url is None else arm.url for name, arm in arms.items()},
        **{key: getattr(config.eval, key) for key in ("concurrency", "repeats", "max_new_tokens", "seed")},
    )
    result = build_result(measurement, losslessness, trained, facts)
    write_json_atomic(out_dir / "result.json", result)
    (out_dir / "report.html").write_text(render_report(result), encoding="utf-8")
    _print_table(console, result)
    return result


def _check_head(config: RunConfig, head_dir: Path | None) -> tuple[HeadManifest | None, dict[str, float] | None]:
    """The manifest of a head that fits the target, and the target's default sampling; before any server starts."""
    if head_dir is None:
        return None, None
    manifest = HeadManifest.load(head_dir)
    target = resolve_target(config.target)
    manifest.check_target(target.fingerprint())
    return manifest, target.sampling


@contextlib.contextmanager
def _arms(
    config: RunConfig,
    head_dir: Path | None,
    out_dir: Path,
    plain_url: str | None,
    spec_url: str | None,
    console: Console,
) -> Iterator[dict[str, Arm]]:
    if plain_url is not None and spec_url is not None:
        yield given_arms(plain_url, spec_url)
        return
    if plain_url is not None or spec_url is not None:
        raise ValueError("give both servers (--plain-url and --spec-url) or neither")
    if head_dir is None:
        raise ValueError("nothing to compare: give --head DIR, or --plain-url and --spec-url of two running servers")
    with contextlib.ExitStack() as stack:
        with console.status(f"starting both servers (logs in {out_dir}); the very first start compiles"):
            arms = stack.enter_context(started_arms(config, config.target.name, head_dir, out_dir))
        yield arms


def _dtype(config: RunConfig, arm: Arm) -> str:
    """What the server computes in, as it said itself, else as this device would choose."""
    said = arm.dtype or config.target.dtype
    return detect_device().dtype if said == "auto" else said


def _trained(measurement: Measurement, manifest: HeadManifest | None, served_k: int | None) -> AcceptanceCounts | None:
    if manifest is None:
        return None
    hashes = [text_sha256(prompt) for prompt in measurement.prompts]
    counts, note = trained_acceptance(manifest.acceptance_by_prompt, hashes, manifest.num_speculative_tokens, served_k)
    if note:
        measurement.notes.append(f"no trained acceptance length on these prompts: {note}")
    return counts


def _head_facts(head_dir: Path | None, manifest: HeadManifest | None) -> dict[str, Any] | None:
    if head_dir is None or manifest is None:
        return None
    return {
        "directory": str(head_dir),
        "name": manifest.head,
        "vllm_method": manifest.vllm_method,
        "draft_vocab_size": manifest.draft_vocab_size,
        "trained_for": manifest.target_name,
    }


def _print_table(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=words.headline(result), title_justify="left", title_style="bold", header_style="dim")
    table.add_column("")
    for mode in result["modes"]:
        table.add_column(mode, justify="right", no_wrap=True)
    for name, cells in words.table_rows(result):
        table.add_row(name, *cells, style="bold" if name.startswith("speed-up") else "")
    console.print(table)
    for kind, count in result["errors"].items():
        console.print(f"[bold]{count} requests failed: {kind}[/bold]")
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
