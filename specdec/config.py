"""One strict configuration tree: keyword-only sections, YAML in, ``--set section.key=value``, YAML out.

What lives here: the knobs of every stage and their defaults. What does not: the knobs of one head
architecture, which its own folder owns (``head.options`` is handed over unread).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(kw_only=True, slots=True)
class TargetConfig:
    """The target model: the one whose output distribution is preserved."""

    name: str = "smollm2-135m"  # an embedded name, a local directory or a Hugging Face id
    revision: str | None = None
    dtype: str = "auto"  # auto: bfloat16 where the device computes it natively, else float32


@dataclass(kw_only=True, slots=True)
class TracesConfig:
    """Where rows come from. Exactly one of the first three is read; none: the embedded mix."""

    files: list[str] = field(default_factory=list)  # existing reasoning traces: files, folders, hf:ORG/NAME
    prompts: str | None = None  # prompts that the target answers itself: file, folder, hf:ORG/NAME
    served: str | None = None  # the folder that a server of the target has filled (serve.keep_traffic)
    regenerate: bool = False  # take the prompts of the traces alone and let the target answer them
    endpoints: list[str] = field(default_factory=list)  # running vLLM servers of the target that share the prompts
    ray_engines: int = 0  # engines of a Ray cluster (RAY_ADDRESS, else this machine) that share them; 0: without Ray
    generations_per_prompt: int = 1  # of rows that hold several, those marked correct
    max_rows: int | None = None  # stop after so many usable rows
    decontaminate: list[str] = field(default_factory=list)  # suites or files whose problems must not occur
    decontaminate_words: int = 13  # length of the word n-grams that must not be shared; shorter texts match whole
    num_prompts: int = 560  # of the embedded task mix
    max_new_tokens: int = 128
    temperature: float | None = None  # None: the target's own generation config
    top_p: float | None = None
    seed: int = 0
    val_fraction: float = 0.06
    max_length: int | None = None  # longer rows are dropped and counted, never cut; None: the target's context
    max_num_seqs: int = 64  # answered at once, by each endpoint or engine


@dataclass(kw_only=True, slots=True)
class HeadConfig:
    """Which draft architecture, and its own options (checked by ``draft_training/heads/<name>``)."""

    name: str = "eagle3"
    num_speculative_tokens: int = 3  # K: trained for, and served by default
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    init_head: str | None = None  # a head of the same architecture and target to start from
    epochs: float = 6.0  # of a broken one the first part is drawn
    batch_tokens: int = 1024  # padded, of one optimizer step, over all processes
    pack_tokens: int | None = None  # rows one behind another, each seeing itself alone, up to so many; None: padded
    accumulation_steps: int = 1  # parts that each process makes of its share, one after another: less memory
    checkpoint_activations: bool = False  # attention and MLPs are computed again in the backward pass: less memory
    parallel: str = "ddp"  # of several processes: ddp | fsdp (weights and optimizer state sharded)
    learning_rate: float | None = None  # None: 2e-3 with muon, 1e-3 with adamw
    optimizer: str = "auto"  # muon (AdamW on lm_head and vectors) | adamw | auto: adamw with FSDP or without bf16
    lm_head_lr_scale: float = 1.0  # 0: frozen, the target's rows
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    ema: float = 0.0  # decay of the weights' moving average, which is evaluated and exported; 0: none
    loss: str = "cross_entropy"  # cross_entropy | lk_hybrid | lk_log, see draft_training/loss.py
    lk_eta: float = 3.0  # how fast the LK losses leave cross-entropy as acceptance grows
    position_weights: str = "decay"  # decay | survival: by the measured probability that drafts are accepted so far
    step_decay: float = 1.0  # decay: the loss weight of draft position i is step_decay ** i
    survival_floor: float = 0.5  # survival: a draft counts as accepted with floor + (1 - floor) * its probability
    num_evals: int = 4
    checkpoint_every_sec: float = 60.0
    feature_cache_dir: str | None = None  # target features on disk, shared by runs; None: in memory, for this run
    feature_cache_gib: float = 4.0  # never passed, by the whole folder or each process's memory; the rest is recomputed
    window_tokens: int = 2048  # loss positions of a row at once; of a longer row one window an epoch, all in turn
    prefix_tokens: int | None = None  # what a window's head attends to before it; None: the whole prefix, as served
    precision: str = "auto"  # auto | bf16 | fp32
    tensorboard: bool = False  # write what train_log.jsonl holds as TensorBoard events too
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """The vLLM server. Values of None are vLLM's own defaults."""

    host: str = "127.0.0.1"
    port: int = 8000
    speculation: bool = True
    num_speculative_tokens: int | None = None  # None: what the head's manifest says
    policy: str | None = None  # auto | off | fixed:K | static: vLLM's own scheduler; None: auto on CPU, else static
    keep_traffic: str | None = None  # folder for finished requests, as rows to train on; None: nothing is kept
    keep_share: float = 0.1  # of the requests
    keep_gib: float = 1.0
    max_model_len: int | None = None
    max_num_seqs: int = 16
    kv_cache_gib: float = 2  # CPU only
    threads_bind: str = "auto"  # CPU only: auto | a core list such as 0-3 | nobind
    enforce_eager: bool = False
    preset: str = "auto"  # auto: R1-Distill targets get their sampling, parser, template and length | none
    api_key_file: str | None = None  # a file that holds the key clients must send; None: VLLM_API_KEY, if set
    startup_timeout_sec: float = 900.0
    health_timeout_sec: float = 120.0  # without a healthy answer; then the server is restarted
    max_restarts: int = 10  # in a row, without some minutes of serving in between; 0: never restart
    require_head: bool = False  # refuse to serve, rather than serve plain, when the head can't be used
    drain_sec: int = 30  # for requests in flight after SIGTERM


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The side-by-side measurement. Lists are swept: every combination is a cell of the result."""

    suites: list[str] = field(default_factory=list)  # names, NAME=FILE, NAME=hf:DATASET, or prompt files
    arms: list[str] = field(default_factory=list)  # name=URL | name=key=value,...; the first is the baseline
    num_prompts: int = 16  # of each suite
    max_new_tokens: int = 128
    thinking_budgets: list[int] = field(default_factory=list)  # thinking tokens; then the answer is asked for
    concurrency: list[int] = field(default_factory=lambda: [1])
    arrival: str = "closed"  # closed | poisson | gamma:SHAPE | trace:FILE
    rate: list[float] = field(default_factory=list)  # requests per second of an open loop
    greedy: bool = True
    repeats: int = 2  # of the greedy cells
    sampled: bool = True  # also measure at the target's default sampling
    temperature: list[float] = field(default_factory=list)  # of the sampled cells; empty: the target's default
    num_samples: list[int] = field(default_factory=lambda: [1])  # answers per prompt of the sampled cells
    distribution_samples: int = 64  # per prompt, of the two-sample test at temperature 1; 0: no test
    distribution_prompts: int = 4
    prompt_excerpts: bool = True  # in the report of prompts whose outputs part, and answers.jsonl; off: no text is kept
    price_per_hour: float | None = None  # of the machine, in your currency
    slo_ttft_sec: float | None = None  # a request counts as goodput when it meets both
    slo_tpot_sec: float | None = None
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The whole tree; every section is usable on its own."""

    target: TargetConfig = field(default_factory=TargetConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


class _Loader(yaml.SafeLoader):
    """Reads on, off, yes and no as words, for ``serve.policy=off`` is no truth value."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
WORDS = {"on": True, "yes": True, "off": False, "no": False}  # where a truth value is wanted


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """Read ``path`` (YAML, may be None), then apply ``section.key=value`` overrides in order.

    Raises:
        ValueError: unknown section or key (the nearest valid one is named), or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.load(path.read_text(), _Loader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"cannot read config {path}: {error}") from error
        if not isinstance(tree, dict):
            raise ValueError(f"config {path} must hold sections (target, traces, ...), not {type(tree).__name__}")
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"--set wants section.key=value, got {override!r}")
        node = tree
        *parents, leaf = key.strip().split(".")
        for parent in parents:
            if node.get(parent) is None:  # absent, or a section left empty in the file
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"--set {override!r}: {parent!r} is a value, not a section")
        try:
            node[leaf] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {override!r}: the value is not valid YAML; quote it") from error
    return from_dict(RunConfig, tree)


def from_dict(cls: type, tree: dict[str, Any] | None, where: str = "") -> Any:
    """Build dataclass ``cls`` from plain data, refusing what it doesn't know."""
    hints = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in (tree or {}).items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise ValueError(f"unknown setting {where}{key}{hint}")
        kwargs[key] = _coerce(hints[key], value, f"{where}{key}")
    return cls(**kwargs)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{where} is a section, not a value: write {where}.key=value")
        return from_dict(hint, value, f"{where}.")
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    origin = typing.get_origin(hint) or hint
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            pass
    if origin is str and isinstance(value, int) and not isinstance(value, bool):  # threads_bind=0, revision=1234567
        value = str(value)
    if origin is bool and isinstance(value, str):
        value = WORDS.get(value.lower(), value)
    if origin is list and not isinstance(value, list):
        value = [value]
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{where} must be {getattr(origin, '__name__', origin)}, got {value!r}")
    if origin is list and typing.get_args(hint):
        return [_coerce(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved tree as plain data; ``from_dict`` of it gives an equal config."""
    return dataclasses.asdict(config)


def dump_yaml(config: Any) -> str:
    """The resolved tree as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)
