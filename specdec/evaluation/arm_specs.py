"""What an arm is, as typed: ``name=URL``, ``name=plain``, or ``name=key=value,...``; and the server it asks for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.manifest import HeadManifest

PLAIN, SPEC = "plain", "spec"
MODEL_FREE_METHODS = ("ngram", "suffix")
KEYS = {
    "head": "directory of a draft head (default: --head)",
    "k": "draft tokens per step",
    "method": f"{' or '.join(MODEL_FREE_METHODS)}: speculation without a head",
    "table": "vLLM's own table of K by batch size, e.g. 1-4:3/5-16:0",
    "synthetic": "acceptance length that vLLM pretends to reach: a cost surface, no claim about the head",
    "quantization": "vLLM's name of a weight quantisation",
}
XARGS = "xargs."  # what each request carries in vllm_xargs, e.g. xargs.specdec=2
PREFIXES = ("serve.", "target.", "vllm.", XARGS)  # settings of specdec, and vLLM's own flags
USAGE = (
    "an arm is name=URL (and ,xargs.X=value), name=plain or name=key=value,... with "
    f"{', '.join(KEYS)}, serve.X, target.X, xargs.X or vllm.FLAG"
)
# A server that quietly came up plain, or again as another process, would be measured as what it is not; and nobody
# waits for the answers of a measurement that was stopped. These win over an arm's own settings.
MEASURED = ("serve.require_head=true", "serve.max_restarts=0", "serve.drain_sec=0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmSpec:
    """One arm to be measured: a running server, or how to start one."""

    name: str
    url: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def xargs(self) -> dict[str, str]:
        """``vllm_xargs`` of each request."""
        return {key.removeprefix(XARGS): value for key, value in self.options.items() if key.startswith(XARGS)}

    def target(self, default: str) -> str:
        """The name of the target that it serves."""
        return self.options.get("target.name", default)

    @property
    def is_synthetic(self) -> bool:
        return "synthetic" in self.options

    @property
    def is_plain(self) -> bool:
        return self.options == {} and self.url is None


def default_specs(head_dir: Path | None) -> list[ArmSpec]:
    """Plain decode against the head.

    Raises:
        ValueError: there is no head.
    """
    if head_dir is None:
        raise ValueError("nothing to compare: give --head DIR, or the arms (--arm name=URL, --arm name=key=value,...)")
    return [ArmSpec(name=PLAIN), ArmSpec(name=SPEC, options={"head": str(head_dir)})]


def parse_specs(texts: list[str], head_dir: Path | None) -> list[ArmSpec]:
    """The arms in order; the first is the baseline.

    Raises:
        ValueError: fewer than two, a name twice, or one that can't be read.
    """
    specs = [_parse(text, head_dir) for text in texts]
    names = [spec.name for spec in specs]
    if len(specs) < 2:
        raise ValueError("one arm compares with nothing: give two or more --arm, the baseline first")
    if specs[0].is_synthetic:
        raise ValueError(f"{texts[0]!r} pretends its acceptance, so nothing compares with it: give the baseline first")
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have one name: {', '.join(names)}")
    return specs


def _parse(text: str, head_dir: Path | None) -> ArmSpec:
    name, equals, value = text.partition("=")
    if not equals or not value or not re.fullmatch(r"[A-Za-z][\w.+-]*", name):
        raise ValueError(f"{text!r}: {USAGE}")
    if value.startswith(("http://", "https://")):
        url, *parts = value.split(",")
        return ArmSpec(name=name, url=url, options=_options(text, parts, (), (XARGS,)))
    if value == PLAIN:
        return ArmSpec(name=name)
    options = _options(text, value.split(","), tuple(KEYS), PREFIXES)
    if "method" in options and options["method"] not in MODEL_FREE_METHODS:
        raise ValueError(f"{text!r}: method must be {' or '.join(MODEL_FREE_METHODS)}; a head says its own")
    speculates = {"k", "table", "synthetic"} & set(options)
    if speculates and not {"head", "method"} & set(options):
        if head_dir is None:
            raise ValueError(f"{text!r}: {', '.join(sorted(speculates))} needs a head: add head=DIR or --head DIR")
        options["head"] = str(head_dir)
    _speculative_config(options, None)  # refuse now what can't be served later
    return ArmSpec(name=name, options=options)


def _options(text: str, parts: list[str], keys: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for part in parts:
        key, equals, setting = part.partition("=")
        if not equals or not setting or not (key in keys or key.startswith(prefixes)):
            raise ValueError(f"{text!r}: can't read {part!r}; {USAGE}")
        options[key] = setting
    return options


def serve_arguments(spec: ArmSpec) -> list[str]:
    """Arguments of ``specdec serve`` for this arm: the head, settings, and after ``--`` vLLM's own flags."""
    options = spec.options
    arguments = ["--head", options["head"]] if "head" in options else ["--no-speculation"]
    # An arm is K at every step unless it says otherwise: a figure that depends on its own past is hard to read.
    arguments += [] if "serve.policy" in options else ["--set", "serve.policy=static"]
    for key, value in options.items():
        if key.startswith(("serve.", "target.")) and key != "target.name":  # that one is `--target`
            arguments += ["--set", f"{key}={value}"]
    for setting in MEASURED:
        arguments += ["--set", setting]
    speculates = bool({"head", "method"} & set(options))  # vLLM refuses the flag on a plain server
    flags = ["--per-request-spec-decode-metrics", "detailed"] if speculates else []
    if "quantization" in options:
        flags += ["--quantization", options["quantization"]]
    for key, value in options.items():
        if key.startswith("vllm."):
            flag = f"--{key.removeprefix('vllm.')}"
            flags += [flag if value == "true" else f"{flag}={value}"]  # vLLM's switches take no value
    manifest = HeadManifest.load(Path(options["head"])) if "head" in options else None
    speculative = _speculative_config(options, manifest)
    if speculative is not None:
        flags += ["--speculative-config", json.dumps(speculative)]
    elif "k" in options:
        arguments += ["--set", f"serve.num_speculative_tokens={options['k']}"]
    return [*arguments, *(["--", *flags] if flags else [])]


def _speculative_config(options: dict[str, str], manifest: HeadManifest | None) -> dict[str, Any] | None:
    """vLLM's own JSON where an option needs it; None where ``specdec serve`` writes it from the head."""
    if not {"method", "table", "synthetic"} & set(options):
        return None
    width = _number(options["k"], int, "k") if "k" in options else None
    config: dict[str, Any] = {}
    if "method" in options:
        config = {"method": options["method"], "num_speculative_tokens": width or 3}
        if options["method"] == "ngram":
            config |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    elif manifest is not None:
        config = manifest.speculative_config(Path(options["head"]), width or manifest.num_speculative_tokens)
    if "table" in options:
        config["num_speculative_tokens_per_batch_size"] = _table(options["table"])
    if "synthetic" in options:
        length = _number(options["synthetic"], float, "synthetic")
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": length}
    return config


def _table(text: str) -> list[tuple[int, int, int]]:
    rows = []
    for part in text.split("/"):
        match = re.fullmatch(r"(\d+)-(\d+):(\d+)", part)
        if match is None:
            raise ValueError(f"table {text!r} must look like 1-4:3/5-16:0, batch sizes first to last and their K")
        rows.append((int(match[1]), int(match[2]), int(match[3])))
    return rows


def _number(text: str, kind: type, name: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if number <= 0:
        raise ValueError(f"{name} must be a number above 0, got {text!r}")
    return number
