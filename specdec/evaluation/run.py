"""``specdec eval`` from end to end: check, serve, measure, grade, write the result and its reports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.config import EvalConfig, RunConfig, to_dict
from specdec.device import detect_device
from specdec.evaluation import answers, words
from specdec.evaluation.acceptance import trained_acceptance
from specdec.evaluation.arm_specs import ArmSpec, default_specs, parse_specs
from specdec.evaluation.arms import Arm, open_arms
from specdec.evaluation.client import ArmClient
from specdec.evaluation.cost import measure_bandwidth, memory_bound, weight_bytes_of
from specdec.evaluation.distribution import Samples, Surprises, collect_samples, prefix_surprises, two_sample_test
from specdec.evaluation.figures import Prices
from specdec.evaluation.journal import Journal
from specdec.evaluation.losslessness import check_greedy
from specdec.evaluation.markdown import render_markdown
from specdec.evaluation.measure import measure, until_signal
from specdec.evaluation.plan import Step, cells_of, num_requests, steps_of
from specdec.evaluation.records import Measurement, Record
from specdec.evaluation.report import render_report
from specdec.evaluation.suites import Suite, load_suite
from specdec.evaluation.summary import build_result
from specdec.manifest import HeadManifest, manifest_path
from specdec.metrics import AcceptanceCounts
from specdec.progress import progress_bar
from specdec.record import file_sha256, provenance, text_sha256, write_json_atomic
from specdec.targets import Target, resolve_target

logger = logging.getLogger(__name__)

LABEL_WIDTH, COLUMN_WIDTH = 33, 23  # characters of the table in the terminal
DISTRIBUTION_TOKENS = 6  # of each sampled continuation
RECORDED_SETTINGS = (
    "concurrency", "arrival", "rate", "repeats", "max_new_tokens", "thinking_budgets", "num_samples",
    "distribution_samples", "distribution_prompts", "seed",
)  # fmt: skip


def evaluate(config: RunConfig, head_dir: Path | None, out_dir: Path) -> dict[str, Any]:
    """Measure ``config.eval.arms`` on ``config.eval.suites``; write ``result.json``, ``report.html``, ``summary.md``,
    and the answers unless ``config.eval.prompt_excerpts`` is off.

    Without arms: plain decode against the head in ``head_dir``. Ctrl-C ends the measurement early; what was measured
    is written, with ``interrupted`` set, and the same command goes on from there.

    Returns:
        The result tree (see ``summary.build_result``).

    Raises:
        ValueError: bad suites or arms, a head of another target, a server that does not start. The message says
            what to do.
    """
    console = Console(stderr=True)
    settings = config.eval
    cells = cells_of(settings)
    specs = parse_specs(settings.arms, head_dir) if settings.arms else default_specs(head_dir)
    suites = _load_suites(settings)
    manifests, target = _check_heads(config, specs)
    names = [spec.name for spec in specs]
    steps = list(steps_of(cells, suites, names, settings.seed))
    measurement = Measurement(cells=cells, baseline=names[0], arms=names)
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(contextlib.closing(Journal(out_dir, _plan_sha256(config, specs, suites))))
        with console.status(f"starting the servers (logs in {out_dir}); the very first start compiles"):
            arms = stack.enter_context(open_arms(specs, config, out_dir))
        losslessness = asyncio.run(_measure(config, measurement, steps, suites, arms, journal))
    _grade(measurement, suites)
    trained = _trained(measurement, manifests.get(names[1]), suites, arms)
    facts = _facts(config, _head_facts(specs, manifests), target, suites, arms)
    prices = Prices(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Prices)})
    bound_sec = _plain_step_bound_sec(config, arms)
    result = build_result(measurement, arms, suites, losslessness, trained, prices, facts, bound_sec)
    if settings.prompt_excerpts:
        answers.write_answers(answers.answers_of(measurement), out_dir / answers.NAME)
    write_json_atomic(out_dir / "result.json", result)
    if not measurement.interrupted:
        journal.remove()  # not before: grading can take long, and a run that dies in it must not be measured again
    (out_dir / "report.html").write_text(render_report(result), encoding="utf-8")
    (out_dir / "summary.md").write_text(render_markdown(result), encoding="utf-8")
    _print_table(console, result)
    return result


def _load_suites(settings: EvalConfig) -> list[Suite]:
    if not settings.suites:
        raise ValueError("nothing to measure on: give --suite NAME or --suite FILE.jsonl (or --prompts FILE)")
    suites = [load_suite(spec, settings.num_prompts, settings.seed) for spec in settings.suites]
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise ValueError(f"two suites have one name: {', '.join(names)}; rename a file")
    return suites


def _check_heads(config: RunConfig, specs: list[ArmSpec]) -> tuple[dict[str, HeadManifest], Target | None]:
    """By arm the manifest of its head, checked against the target; and that, unless all arms are URLs."""
    if all(spec.url for spec in specs):
        return {}, None
    manifests = {spec.name: HeadManifest.load(Path(spec.options["head"])) for spec in specs if "head" in spec.options}
    for spec in specs:
        if spec.name in manifests:
            own = resolve_target(dataclasses.replace(config.target, name=spec.target(config.target.name)))
            manifests[spec.name].check_target(own.fingerprint(), own.is_quantised)
    return manifests, resolve_target(config.target)


def _plan_sha256(config: RunConfig, specs: list[ArmSpec], suites: list[Suite]) -> str:
    """Of everything that a measurement depends on: one that goes on must be the same one."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in ("eval", "target", "serve")}
    plan = {**sections, "arms": [dataclasses.asdict(spec) for spec in specs]}
    files = [manifest_path(Path(spec.options["head"])) for spec in specs if "head" in spec.options]
    kind, _, trace = config.eval.arrival.partition(":")
    files += [Path(trace)] if kind == "trace" else []
    hashes = [suite.sha256 for suite in suites]
    return text_sha256(json.dumps(plan, sort_keys=True), *hashes, *(path.read_text() for path in files))


async def _measure(
    config: RunConfig,
    measurement: Measurement,
    steps: list[Step],
    suites: list[Suite],
    arms: dict[str, Arm],
    journal: Journal,
) -> dict[str, Any]:
    """Fill the measurement, then ask the servers what losslessness needs. Returns the ``losslessness`` tree."""
    settings = config.eval
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(ArmClient(arm)) for name, arm in arms.items()}
        if len({(arm.url, *sorted(arm.xargs.items())) for arm in arms.values()}) < len(arms):
            measurement.notes.append("two arms are one server asked alike (an A/A run): they differ by noise alone")
        with progress_bar("measuring", num_requests(steps)) as advance:
            await measure(measurement, steps, clients, journal, settings.seed, advance)
        baseline = clients[measurement.baseline]
        texts = {(suite.name, item.id): item.turns for suite in suites for item in suite.items}

        def prompt_text(record: Record) -> str:
            return texts[record.suite, record.item_id][record.turn] if settings.prompt_excerpts else ""

        losslessness: dict[str, Any] = {"greedy": [], "distribution": []}

        async def check() -> None:
            dtype = _dtype(config, baseline.arm)
            losslessness["greedy"] = await check_greedy(measurement, baseline, dtype, prompt_text)
            if settings.distribution_samples and not measurement.interrupted:
                losslessness["distribution"] = await _distribution(settings, suites, clients, measurement)

        if not await until_signal(check()):
            measurement.interrupted = True
    return losslessness


async def _distribution(
    settings: EvalConfig, suites: list[Suite], clients: dict[str, ArmClient], measurement: Measurement
) -> list[dict[str, Any]]:
    """The two-sample test at temperature 1 of every arm that decides tokens for itself, against the baseline."""
    prompts = {f"{suite.name}/{item.id}": item.turns[0] for suite in suites for item in suite.items}
    prompts = dict(list(prompts.items())[: settings.distribution_prompts])
    tested = {name: client for name, client in clients.items() if not client.arm.synthetic}
    in_flight = max(16, *settings.concurrency)
    samples = {}
    with progress_bar("two-sample test", len(tested)) as advance:
        for name, client in tested.items():
            client.cold_prompts = False  # nothing is timed, and each prompt is sent many times
            found = await collect_samples(
                client, prompts, settings.distribution_samples, DISTRIBUTION_TOKENS, in_flight
            )
            for kind, count in found.errors.items():
                measurement.notes.append(f"two-sample test: {count} requests to {name} failed: {kind}")
            samples[name] = found
            advance(1, name)
        surprises = await _surprises(clients[measurement.baseline], list(samples.values()), in_flight, measurement)
    baseline = samples.pop(measurement.baseline)
    return [
        {"arm": name, **two_sample_test(baseline.by_prompt, found.by_prompt, surprises=surprises)}
        for name, found in samples.items()
    ]


async def _surprises(
    client: ArmClient, samples: list[Samples], in_flight: int, measurement: Measurement
) -> Surprises | None:
    """The target's own opinion of what was sampled; the test is weaker without, and says so."""
    import httpx

    try:
        return await prefix_surprises(client, samples[0].prompt_token_ids, samples, in_flight)
    except (httpx.HTTPError, ValueError) as error:
        measurement.notes.append(f"two-sample test: weaker, without the target's log-probabilities ({error})")
        return None


def _grade(measurement: Measurement, suites: list[Suite]) -> None:
    """Check every answer against its gold answer; done after the measurement, which it would disturb."""
    checks = {suite.name: suite.check for suite in suites}
    items = {(suite.name, item.id): item for suite in suites for item in suite.items}
    records = [
        record
        for run in measurement.runs
        for record in run.records
        if checks[record.suite] is not None and record.turn == 0 and not record.result.error
    ]
    if not records:
        return
    with progress_bar("grading", len(records)) as advance:
        for record in records:
            check = checks[record.suite]
            assert check is not None
            verdict = check(items[record.suite, record.item_id], record.result.text)
            record.correct, record.answer = verdict.correct, verdict.answer
            advance(1)


def _dtype(config: RunConfig, arm: Arm) -> str:
    """What the server computes in, as it said itself, else as this device would choose."""
    return detect_device().settled(arm.dtype or config.target.dtype)


def _plain_step_bound_sec(config: RunConfig, arms: dict[str, Arm]) -> float | None:
    """The least that a plain step can take on this CPU: reading every weight once. None where that isn't known."""
    dtypes = {arm.dtype for arm in arms.values()}
    if detect_device().kind != "cpu" or len(dtypes) > 1 or None in dtypes:
        return None
    target = resolve_target(config.target)
    stored = str(target.config.get("dtype") or target.config.get("torch_dtype") or "bfloat16")
    weight_bytes = weight_bytes_of(target.path, stored, str(dtypes.pop()))
    return memory_bound(weight_bytes, 0, 0, measure_bandwidth())  # short contexts: their cache is small beside it


def _trained(
    measurement: Measurement, manifest: HeadManifest | None, suites: list[Suite], arms: dict[str, Arm]
) -> AcceptanceCounts | None:
    """What training measured on these prompts, when the first arm after the baseline serves that head."""
    arm = arms[next(name for name in measurement.arms if name != measurement.baseline)]
    if manifest is None or "head" not in arm.options:
        return None
    hashes = [text_sha256(item.turns[0]) for suite in suites for item in suite.items]
    counts, note = trained_acceptance(
        manifest.acceptance_by_prompt, hashes, manifest.num_speculative_tokens, arm.num_speculative_tokens
    )
    if note:
        measurement.notes.append(f"no trained acceptance length on these prompts: {note}")
    return counts


def _facts(
    config: RunConfig,
    head: dict[str, Any] | None,
    target: Target | None,
    suites: list[Suite],
    arms: dict[str, Arm],
) -> dict[str, Any]:
    settings = to_dict(config.eval)
    return provenance(
        target=config.target.name,
        head=head,
        num_speculative_tokens=max(arm.num_speculative_tokens or 0 for arm in arms.values()),
        temperature=list(dict.fromkeys(cell.temperature for cell in cells_of(config.eval))),
        target_weights_sha256=target.fingerprint().weights_sha256 if target is not None else None,
        default_sampling=target.sampling if target is not None else None,
        prompts_sha256=text_sha256(*(suite.sha256 for suite in suites)),
        num_prompts=sum(len(suite.items) for suite in suites),
        servers={name: arm.url if not arm.dtype else "started here" for name, arm in arms.items()},
        config={"target": to_dict(config.target), "serve": to_dict(config.serve)},
        **{key: settings[key] for key in RECORDED_SETTINGS},
    )


def _head_facts(specs: list[ArmSpec], manifests: dict[str, HeadManifest]) -> dict[str, Any] | None:
    """The first head that is compared with the baseline."""
    spec = next((spec for spec in specs[1:] if spec.name in manifests), None)
    if spec is None:
        return None
    manifest, weights = manifests[spec.name], Path(spec.options["head"]) / "model.safetensors"
    return {
        "directory": spec.options["head"],
        "weights_sha256": file_sha256(weights) if weights.is_file() else None,
        "name": manifest.head,
        "vllm_method": manifest.vllm_method,
        "draft_vocab_size": manifest.draft_vocab_size,
        "trained_for": manifest.target_name,
    }


def _print_table(console: Console, result: dict[str, Any]) -> None:
    console.print(words.headline(result), style="bold", highlight=False)
    names, rows = words.columns(result), words.table_rows(result)
    per_table = max(1, (console.width - LABEL_WIDTH) // COLUMN_WIDTH)
    for start in range(0, len(names), per_table):
        part = slice(start, start + per_table)
        table = Table(header_style="dim")
        table.add_column("", no_wrap=True)
        for name in names[part]:
            table.add_column(str(name), justify="right")
        for label, cells in rows:
            if any(cell != words.NOTHING for cell in cells[part]):
                table.add_row(label, *cells[part], style="bold" if label.startswith("speed-up") else "")
        console.print(table)
    for kind, count in result["errors"].items():
        console.print(f"[bold]{count} requests with trouble: {kind}[/bold]")
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)
