"""The command line: parse, load the config, call one function. Logs go to stderr, data to stdout.

A user's mistake ends in one line that says what to do and exit code 2; stages are imported when they run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from specdec.config import RunConfig

INTERRUPTED = 130  # as a shell's own exit code after Ctrl-C

app = typer.Typer(
    name="specdec",
    help="Make your reasoning model decode faster, losslessly, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Target = Annotated[
    str | None, typer.Option("--target", help="Embedded name (smollm2-135m), local directory or Hugging Face id.")
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
Out = Annotated[Path, typer.Option("--out", help="Directory to write to.")]
HeadDir = Annotated[Path | None, typer.Option("--head", help="Head directory made by `specdec train`.")]


def _load(config: Path | None, overrides: list[str] | None, target: str | None) -> RunConfig:
    from specdec.config import load_config

    run = load_config(config, overrides)
    if target is not None:
        run.target.name = target
    return run


def _echo_json(tree: dict[str, Any]) -> None:
    typer.echo(json.dumps(tree))


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, device and threads, and what is missing for best speed."""
    from specdec import environment

    report = environment.report()
    if as_json:
        _echo_json(report)
    else:
        typer.echo(environment.render(report))


@app.command()
def prepare(
    out: Out,
    target: Target = None,
    traces: Annotated[
        list[str] | None, typer.Option(help="Reasoning traces: file, folder or hf:ORG/NAME; may be repeated.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts for the target to answer, in any of these forms.")
    ] = None,
    regenerate: Annotated[
        bool, typer.Option("--regenerate", help="Let the target answer the prompts of the traces itself.")
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Make token-exact training rows: from traces, or by letting the target answer prompts."""
    from draft_training.prepare import prepare as run_prepare

    run = _load(config, overrides, target)
    run.traces.files = traces or run.traces.files
    run.traces.prompts = prompts or run.traces.prompts
    run.traces.regenerate = run.traces.regenerate or regenerate
    card = run_prepare(run, out)
    _echo_json({"rows": str(out), "splits": card["splits"], "dropped": card["dropped"]})


@app.command()
def train(
    out: Out,
    target: Target = None,
    traces: Annotated[
        str | None, typer.Option(help="Traces (file, folder or hf:ORG/NAME), or a `specdec prepare` directory.")
    ] = None,
    from_served: Annotated[
        Path | None, typer.Option(help="Requests that a server has answered: its folder serve.keep_traffic.")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Draft architecture: eagle3, peagle, eagle or medusa.")
    ] = None,
    init_head: Annotated[
        Path | None, typer.Option(help="A trained head that goes on learning, with its architecture and settings.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Train a draft head and export it as vLLM loads it. The same command continues an interrupted run."""
    from draft_training.interrupt import Interrupted
    from draft_training.train import train as run_train
    from specdec.device import process_rank

    run = _load(config, overrides, target)
    if head is not None:
        run.head.name = head
    run.traces.served = str(from_served) if from_served is not None else run.traces.served
    run.train.init_head = str(init_head) if init_head is not None else run.train.init_head
    try:
        manifest = run_train(run, traces, out)
    except Interrupted:
        if process_rank() == 0:
            typer.echo(f"error: interrupted; the checkpoint is in {out}: run the same command to continue", err=True)
        raise typer.Exit(2) from None
    if process_rank():
        return
    figures = ("acceptance_length", "acceptance_rate", "per_position_rates")
    _echo_json({"head": str(out), **{name: manifest.acceptance[name] for name in figures}})


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    target: Target = None,
    head: HeadDir = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default 8000; 0: a free one).")] = None,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Serve plain decode.")] = False,
    policy: Annotated[
        str | None, typer.Option(help="auto: K by measured goodput, 0 when plain is faster; off; fixed:K.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Serve the target with the head on vLLM's OpenAI API. Anything after -- goes to vLLM."""
    from serving.serve import serve as run_serve

    run = _load(config, overrides, target)
    run.serve.host = host or run.serve.host
    run.serve.port = run.serve.port if port is None else port
    run.serve.policy = policy or run.serve.policy
    run.serve.speculation = run.serve.speculation and not no_speculation
    raise typer.Exit(run_serve(run, head, _vllm_arguments(context.args)))


def _vllm_arguments(arguments: list[str]) -> list[str]:
    """What followed ``--`` on the command line.

    Raises:
        ValueError: something else in front of it: a typing error, or a target named as vLLM's own command takes it.
    """
    after = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    before = arguments[: len(arguments) - len(after)]
    if before and not before[0].startswith("-"):
        raise ValueError(f"unexpected {before[0]}: if that is the target, say --target {before[0]}")
    if before:
        raise ValueError(f"unknown option {before[0]}; see `specdec serve --help`, and put vLLM's own options after --")
    return after


@app.command(name="eval")
def evaluate(
    out: Out,
    target: Target = None,
    head: HeadDir = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Benchmark (gsm8k, math500, aime24, ...), NAME=FILE, or a prompt file; may be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts (JSONL or text): a suite of your own.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="name=URL, name=plain or name=key=value,...; the first is the baseline; may be repeated."),
    ] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests in flight; 1,4,16 is a sweep.")] = None,
    arrival: Annotated[str | None, typer.Option(help="closed, poisson, gamma:SHAPE or trace:FILE.")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second of an open loop; 0.5,1,2 is a sweep.")] = None,
    samples: Annotated[str | None, typer.Option(help="Sampled answers per prompt; 1,4,16 is a sweep.")] = None,
    thinking_budget: Annotated[str | None, typer.Option(help="Thinking tokens; 256,1024 is a sweep.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of the machine: adds costs to the report.")] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Measure acceptance, speed-up, losslessness and accuracy of servers side by side."""
    from specdec.evaluation.run import evaluate as run_evaluate

    lists = {"concurrency": concurrency, "rate": rate, "thinking_budgets": thinking_budget, "num_samples": samples}
    given = [f"eval.{name}=[{text}]" for name, text in lists.items() if text is not None]
    single = {"arrival": arrival, "price_per_hour": price_per_hour}
    given += [f"eval.{name}={value}" for name, value in single.items() if value is not None]
    run = _load(config, [*(overrides or []), *given], target)
    run.eval.suites = [*(suite or []), *([str(prompts)] if prompts else [])] or run.eval.suites
    run.eval.arms = arm or run.eval.arms
    result = run_evaluate(run, head, out)
    _echo_json({"result": str(out / "result.json"), "report": str(out / "report.html"), **result["summary"]})
    if result["interrupted"]:  # a script must not take half a measurement for a whole one
        raise typer.Exit(INTERRUPTED)


@app.command()
def doctor(
    head: Annotated[
        str, typer.Argument(help="A draft head, EAGLE-1, EAGLE-3, speculators or Medusa: its directory or hub id.")
    ],
    target: Target = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also serve it, and compare with training on the same answers.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for --parity; otherwise tasks of reasoning-gym.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Look for what is wrong with a head, above all what vLLM would not tell. Exits with 1 when it finds something."""
    from specdec.doctor import diagnose, find_head
    from specdec.doctor.parity import check_parity
    from specdec.targets import resolve_target

    run = _load(config, overrides, target)
    directory = find_head(head)
    findings = diagnose(directory, resolve_target(run.target))
    if parity and not findings:
        from draft_training.exported import acceptance_on

        findings = check_parity(run, directory, prompts, acceptance_on)
    if as_json:
        _echo_json({"head": head, "clean": not findings, "findings": [asdict(finding) for finding in findings]})
    for finding in [] if as_json else findings:
        typer.echo(f"{finding.code}: {finding.what}\n  fix: {finding.fix}")
    if not findings and not as_json:
        typer.echo(f"{head}: nothing found")
    raise typer.Exit(1 if findings else 0)


@app.command()
def swap(
    head: Annotated[
        Path, typer.Argument(help="Head directory, of the same architecture and shape as the running one.")
    ],
    url: Annotated[str, typer.Option(help="A server of `specdec serve` on this machine.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the server wants one.")] = None,
) -> None:
    """Let another head draft in a running server; the old one comes back when acceptance falls."""
    from serving.swap import request_swap

    _echo_json(request_swap(url, head, api_key))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions ahead of the conversation.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of one answer, its thinking included.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the server wants one.")] = None,
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain text.")] = False,
) -> None:
    """Chat with a server: thinking dim, and below each answer its speed and acceptance length."""
    from specdec.chat.session import ChatOptions, run_chat

    run_chat(
        ChatOptions(
            url=url, model=model, system=system, temperature=temperature, max_tokens=max_tokens, api_key=api_key,
            no_color=no_color,
        )
    )  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories that `specdec eval` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
) -> None:
    """Compare runs of `specdec eval` on one page."""
    from specdec.evaluation.compare import load_runs, render_comparison

    page = render_comparison(load_runs(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    typer.echo(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to write to.")] = Path("runs/demo"),
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """prepare, train and eval on the embedded target: from nothing to a measured speed-up."""
    from specdec.demo import run_demo

    raise typer.Exit(run_demo(out, config, overrides or []))


def main() -> None:
    """Console entry point: errors of the user's making become one line and exit code 2."""
    from specdec.device import process_rank

    logging.basicConfig(
        level="WARNING" if process_rank() else os.environ.get("SPECDEC_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "vllm", "transformers", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its retries itself
    try:
        app(standalone_mode=True)
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"the disk is full ({error.filename}): free some space and run the same command again")
    except KeyboardInterrupt:
        _fail("interrupted; run the same command to continue where it stopped")


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.stderr.flush()
    os._exit(2) if _has_engine_threads() else sys.exit(2)


def _has_engine_threads() -> bool:
    """vLLM's client threads would hold a failed process open."""
    return "vllm" in sys.modules
