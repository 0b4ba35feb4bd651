"""From config, target and head to a vLLM command line and environment. Pure: nothing is started here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from serving.access import key_environment, open_server_warning
from serving.flags import ServerFlags
from serving.graphs import with_every_width
from serving.kept_times import times_path
from serving.policy import AUTO, STATIC, parse_policy
from serving.presets import preset_flags, quantized_cache_warning
from serving.scheduler import POLICY_VARIABLE
from serving.traffic import TrafficLog, claim
from specdec.config import ServeConfig, TargetConfig
from specdec.device import Device, vllm_environment
from specdec.manifest import HeadManifest
from specdec.targets import Target

# The server's entry point as `vllm serve` runs it, without importing the other subcommands first.
ENTRY_MODULE = "vllm.entrypoints.openai.api_server"

# Plugins that vLLM loads unasked. Endpoints are not among them: whose shall be served is the user's choice.
PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))

SCHEDULER = "serving.scheduler.make_scheduler"

# On CPU a prompt is prefilled in one step (see _cpu_flags), and vLLM sizes its buffers, and its compile warm-up,
# for the largest step: a longer default would cost every start for prompts that few CPU users send.
CPU_DEFAULT_MODEL_LEN = 4096
KV_BLOCK_TOKENS = 128  # vLLM's KV block on CPU
NO_HEAD = "speculation needs a draft head: pass --head DIR, or --no-speculation to serve the target alone"
DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerPlan:
    """One vLLM server, ready to be started."""

    argv: list[str]
    env: dict[str, str] = field(repr=False)  # added to this process's, or taken from it where empty; may hold a key
    url: str  # where a client on this machine reaches it
    host: str
    port: int
    served_model_name: str
    target: str
    head: str | None  # its architecture; None: plain decode
    num_speculative_tokens: int  # K; 0: plain decode
    dtype: str
    head_dir: str | None = None  # None: plain decode, or a head of the user's own --speculative-config
    warnings: tuple[str, ...] = ()  # what the user should know before it starts


@dataclass(kw_only=True, slots=True)
class _Flags:
    """Our flags in order; one that the user set is left out, so that theirs stands alone."""

    user: ServerFlags
    argv: list[str] = field(default_factory=list)

    def add(self, name: str, value: object = None) -> None:
        if name not in self.user:
            self.argv += [name] if value is None else [name, str(value)]


def plan_server(
    target: Target,
    serve: ServeConfig,
    target_config: TargetConfig,
    device: Device,
    head_dir: Path | None,
    manifest: HeadManifest | None,
    extra_args: list[str],
    environ: Mapping[str, str] | None = None,
) -> ServerPlan:
    """Decide how the target, and the head unless ``serve.speculation`` is off, are served.

    ``extra_args`` are vLLM's own flags; they win over what is decided here. ``environ`` is the environment that
    the server will inherit (default: this process's).

    Raises:
        ValueError: speculation without a head, more draft tokens than the head was trained for, a length that
            the target cannot hold, or flags that contradict each other. The message says what to change.
    """
    environ = os.environ if environ is None else environ
    user = ServerFlags(extra_args)
    speculative = _speculative_config(serve, head_dir, manifest, user)
    num_draft_tokens = int(speculative["num_speculative_tokens"]) if speculative else 0
    dtype = user.get("--dtype") or _dtype(target_config, device)
    host = user.get("--host") or serve.host
    port = user.get_int("--port") or serve.port
    name = user.get("--served-model-name") or target.name

    flags = _Flags(user=user)
    for flag, value in {"--model": target.path, "--served-model-name": name, "--host": host, "--port": port}.items():
        flags.add(flag, value)
    if dtype != "auto":
        flags.add("--dtype", dtype)
    _add_limits(flags, serve, device, _max_model_len(target, serve, device, dtype, user), _step_tokens(speculative))
    if serve.enforce_eager:
        flags.add("--enforce-eager")
    for flag, value in preset_flags(target, serve, device, user).items():
        flags.add(flag, value)
    env = _environment(serve, device, user, environ) | key_environment(serve, user) | _plugins(environ)
    warnings = (open_server_warning(host, user, {**environ, **env}), quantized_cache_warning(user))
    policy = _policy(serve, speculative, device, user)
    if speculative:
        if device.kind == "cuda" and policy != STATIC:
            speculative = with_every_width(speculative, user.get_int("--max-num-seqs") or serve.max_num_seqs)
        flags.add("--speculative-config", json.dumps(speculative))
        flags.add("--per-request-spec-decode-metrics", "summary")  # what `specdec chat` shows below an answer
    shape = [str(target.path), dtype, json.dumps(speculative), str(serve.enforce_eager), repr(device), *extra_args]
    env |= _add_policy(flags, policy, serve, manifest, target, times_path(*shape, *map(str, sorted(env.items()))))
    return ServerPlan(
        argv=[sys.executable, "-m", ENTRY_MODULE, *flags.argv, *extra_args],
        env=env,
        url=f"http://{_client_host(host)}:{port}",
        host=host,
        port=port,
        served_model_name=name,
        target=target.name,
        head=_head_name(speculative, head_dir, manifest),
        head_dir=_served_dir(speculative, head_dir),
        num_speculative_tokens=num_draft_tokens,
        dtype=dtype if dtype != "auto" else str(target.config.get("dtype") or target.config.get("torch_dtype", dtype)),
        warnings=tuple(filter(None, warnings)),
    )


def _speculative_config(
    serve: ServeConfig, head_dir: Path | None, manifest: HeadManifest | None, user: ServerFlags
) -> dict[str, Any] | None:
    if "--speculative-config" in user:
        text = user.get("--speculative-config")
        try:
            given = json.loads(text or "")
            return {"num_speculative_tokens": 0, **given}
        except (ValueError, TypeError) as error:
            raise ValueError(f"--speculative-config after -- must be one JSON object, got {text!r}") from error
    if not serve.speculation:
        return None
    if head_dir is None or manifest is None:
        raise ValueError(NO_HEAD)
    trained = manifest.num_speculative_tokens
    num_draft_tokens = trained if serve.num_speculative_tokens is None else serve.num_speculative_tokens
    if num_draft_tokens < 1:
        raise ValueError(
            f"num_speculative_tokens must be at least 1, got {num_draft_tokens}; to serve plain pass --no-speculation"
        )
    if num_draft_tokens > trained:
        raise ValueError(
            f"num_speculative_tokens is {num_draft_tokens} but head {head_dir} was trained for {trained}: "
            f"serve it with at most {trained}, or train a head for more"
        )
    return manifest.speculative_config(Path(head_dir), num_draft_tokens)


def _head_name(speculative: dict[str, Any] | None, head_dir: Path | None, manifest: HeadManifest | None) -> str | None:
    if speculative is None:
        return None
    if manifest is not None and _served_dir(speculative, head_dir) is not None:
        return manifest.head
    return str(speculative.get("method") or speculative.get("model"))


def _served_dir(speculative: dict[str, Any] | None, head_dir: Path | None) -> str | None:
    resolved = None if head_dir is None else str(Path(head_dir).resolve())
    return resolved if speculative is not None and speculative.get("model") == resolved else None


def _dtype(target_config: TargetConfig, device: Device) -> str:
    if target_config.dtype != "auto" or device.kind == "cuda":
        return target_config.dtype
    return device.dtype


def _max_model_len(
    target: Target, serve: ServeConfig, device: Device, dtype: str, user: ServerFlags
) -> int | str | None:
    """Longest prompt plus answer, in tokens; ``auto`` lets vLLM fit it to the GPU's memory."""
    if "--max-model-len" in user:
        return user.get_int("--max-model-len")
    longest = target.max_position_embeddings
    if serve.max_model_len is not None:
        if not 1 <= serve.max_model_len <= longest:
            raise ValueError(
                f"max_model_len is {serve.max_model_len}; target {target.name} takes 1 to {longest} tokens"
            )
        return serve.max_model_len
    if device.kind != "cpu":
        return "auto"
    # A block is kept back for the head's layer, which shares the KV space.
    room = int(serve.kv_cache_gib * 2**30) // _kv_bytes_per_token(target, dtype) - KV_BLOCK_TOKENS
    if room < KV_BLOCK_TOKENS:
        raise ValueError(f"kv_cache_gib={serve.kv_cache_gib:g} holds no request of target {target.name}: raise it")
    return min(longest, CPU_DEFAULT_MODEL_LEN, room // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS)


def _kv_bytes_per_token(target: Target, dtype: str) -> int:
    config = target.config
    num_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // num_heads)
    num_layers = int(config["num_hidden_layers"]) + 1  # one layer of a draft head
    return 2 * num_layers * int(config.get("num_key_value_heads") or num_heads) * head_dim * DTYPE_BYTES.get(dtype, 4)


def _step_tokens(speculative: dict[str, Any] | None) -> int:
    """Tokens that one running request takes of a step's budget."""
    if not speculative:
        return 1
    num_draft_tokens = int(speculative["num_speculative_tokens"])
    # Parallel drafting adds a slot for each mask, K - 1, to what verification takes.
    return num_draft_tokens + 1 + (max(0, num_draft_tokens - 1) if speculative.get("parallel_drafting") else 0)


def _add_limits(
    flags: _Flags, serve: ServeConfig, device: Device, max_model_len: int | str | None, step_tokens: int
) -> None:
    flags.add("--max-num-seqs", serve.max_num_seqs)
    if max_model_len is not None:
        flags.add("--max-model-len", max_model_len)
    if device.kind == "cpu":
        flags.add("--kv-cache-memory-bytes", int(serve.kv_cache_gib * 2**30))
    if device.kind != "cpu" or "--enable-chunked-prefill" in flags.user:
        return
    # In vLLM 0.32 a request with a seed whose prompt is prefilled in chunks kills the engine on CPU: after each
    # partial chunk the runner rewinds the request's generator, and CPU generators have no offset. One step per
    # prompt removes the cause; clients need not know. The step must then hold the longest prompt beside the
    # tokens of all running requests, or such a prompt would wait for an idle server.
    flags.add("--no-enable-chunked-prefill")
    max_num_seqs = flags.user.get_int("--max-num-seqs") or serve.max_num_seqs
    if isinstance(max_model_len, int):
        flags.add("--max-num-batched-tokens", max_model_len + max_num_seqs * step_tokens)


def _policy(serve: ServeConfig, speculative: dict[str, Any] | None, device: Device, user: ServerFlags) -> str:
    """The policy, or static where another than vLLM's own may not choose K.

    On a GPU static is the default: there K = 0 is far from plain decode still, and K = 3 dearer when it may change
    (``experiments/gpu_serving``).
    """
    policy = serve.policy or (AUTO if device.kind == "cpu" else STATIC)
    if policy != STATIC:
        _, width = parse_policy(policy)
        widest = int(speculative["num_speculative_tokens"]) if speculative else None
        if width is not None and widest is not None and width > widest:
            raise ValueError(f"policy {policy} asks for more draft tokens than the {widest} that are served")
    has_table = "num_speculative_tokens_per_batch_size" in (speculative or {})  # what the user wants to decide by
    # Engines that step in lockstep must draft alike, and each would choose for itself.
    is_lockstep = (user.get_int("--data-parallel-size") or 1) > 1
    if has_table or is_lockstep or "--scheduler-cls" in user:
        return STATIC
    return policy


def _add_policy(
    flags: _Flags, policy: str, serve: ServeConfig, manifest: HeadManifest | None, target: Target, times: Path
) -> dict[str, str]:
    """The scheduler that asks the policy for K and counts what happens, and what both start from."""
    if policy == STATIC:
        if serve.keep_traffic:
            raise ValueError("keep_traffic needs a policy that sees the requests: serve with --policy auto")
        return {}
    flags.add("--scheduler-cls", SCHEDULER)
    start = {
        "policy": policy,
        "conditional_rates": manifest.conditional_rates if manifest else [],
        "think_start": _token_ids(target, "<think>"),
        "think_end": _token_ids(target, "</think>"),
        "traffic": _traffic(serve, target),
        "times": str(times),
    }
    return {POLICY_VARIABLE: json.dumps(start)}


def _traffic(serve: ServeConfig, target: Target) -> dict[str, Any] | None:
    if not serve.keep_traffic:
        return None
    directory, max_bytes = Path(serve.keep_traffic).resolve(), int(serve.keep_gib * 2**30)
    TrafficLog(directory, serve.keep_share, max_bytes).close()  # what is wrong with them is said now
    claim(directory, target.fingerprint())
    return {"directory": str(directory), "share": serve.keep_share, "max_bytes": max_bytes}


def _token_ids(target: Target, text: str) -> list[int]:
    """As the target's tokenizer reads it alone; [] without a tokenizer.json."""
    from tokenizers import Tokenizer

    path = Path(target.path) / "tokenizer.json"
    return Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids if path.is_file() else []


def _environment(serve: ServeConfig, device: Device, user: ServerFlags, environ: Mapping[str, str]) -> dict[str, str]:
    env = vllm_environment(device, environ, serve.threads_bind, kv_cache_gib=None)
    if env and serve.threads_bind == "auto" and (user.get_int("--tensor-parallel-size") or 1) > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "auto"  # several ranks share the cores by NUMA node, as vLLM deals them
    return env


def _plugins(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours load only where ``VLLM_PLUGINS`` names them, and then no plugin loads that it does not name."""
    given = environ.get("VLLM_PLUGINS")
    if given is None:
        names = [entry.name for group in PLUGIN_GROUPS for entry in entry_points(group=group)]
    else:
        names = [name for name in given.split(",") if name]
    return {"VLLM_PLUGINS": ",".join(dict.fromkeys([*names, "specdec"]))}


def _client_host(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable
