"""``specdec.json``: what an exported head says about itself. Training writes it, serving and eval read it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.config import from_dict
from specdec.record import write_json_atomic

MANIFEST_NAME = "specdec.json"
FORMAT_VERSION = 1


@dataclass(kw_only=True, slots=True)
class TargetFingerprint:
    """The facts of a target that a head depends on; two targets with equal facts are interchangeable."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    weights_sha256: str  # of the safetensors headers and sizes; tells a base model from its fine-tune by name and shape
    chat_template_sha256: str


@dataclass(kw_only=True, slots=True)
class HeadManifest:
    """The contract between training and serving."""

    head: str  # the architecture, a folder of draft_training/heads
    vllm_method: str  # vLLM's name for it in --speculative-config
    num_speculative_tokens: int
    target_name: str
    target: TargetFingerprint
    draft_vocab_size: int
    vllm_speculative: dict[str, Any] = field(default_factory=dict)  # further keys of --speculative-config
    acceptance: dict[str, Any] = field(default_factory=dict)  # held-out, served-like: counts and rates
    acceptance_by_prompt: dict[str, list[int]] = field(default_factory=dict)  # prompt hash -> accepted count per draft
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def save(self, directory: Path) -> None:
        """Write ``specdec.json`` into ``directory`` atomically."""
        write_json_atomic(directory / MANIFEST_NAME, dataclasses.asdict(self))

    @property
    def conditional_rates(self) -> list[float]:
        """Acceptance of position i among the held-out drafts accepted before it; [] when training wrote none."""
        marginal = [1.0, *self.acceptance.get("per_position_rates", [])]
        return [after / before if before else 0.0 for before, after in itertools.pairwise(marginal)]

    def speculative_config(self, directory: Path, num_speculative_tokens: int) -> dict[str, Any]:
        """vLLM's ``--speculative-config`` for the head in ``directory``."""
        # Else vLLM spreads an EAGLE-3 head's logits over the target's whole vocabulary for each draft token, and looks
        # for the largest there.
        argmax = {"use_local_argmax_reduction": True} if self.vllm_method == "eagle3" else {}
        return {
            "method": self.vllm_method,
            "model": str(Path(directory).resolve()),
            "num_speculative_tokens": num_speculative_tokens,
            **argmax,
            **self.vllm_speculative,
        }

    @classmethod
    def load(cls, directory: Path) -> HeadManifest:
        """Read a head directory's manifest.

        Raises:
            ValueError: no such directory, no manifest in it, or one that can't be read.
        """
        path = manifest_path(directory)
        try:
            tree = json.loads(path.read_text())
            if not isinstance(tree, dict):
                raise ValueError(f"a {type(tree).__name__} instead of an object")
            version = tree.get("format_version", FORMAT_VERSION)
            if version == FORMAT_VERSION:
                return from_dict(cls, tree)
        except (TypeError, ValueError) as error:  # undecodable text and bad JSON are ValueErrors
            raise ValueError(f"{path} is damaged ({error}); export the head again with `specdec train`") from error
        raise ValueError(
            f"{path} has format version {version}, this specdec reads {FORMAT_VERSION}: use the specdec that wrote it, "
            "or train the head again"
        )

    def check_target(self, fingerprint: TargetFingerprint, quantised: bool = False) -> None:
        """Refuse a target that this head was not trained for. Of a ``quantised`` one the weights can't be compared.

        Raises:
            ValueError: names the facts that differ.
        """
        differing = [
            f"{f.name} {getattr(self.target, f.name)} != {getattr(fingerprint, f.name)}"
            for f in dataclasses.fields(TargetFingerprint)
            if getattr(self.target, f.name) != getattr(fingerprint, f.name)
            and not (quantised and f.name == "weights_sha256")
        ]
        if differing:
            raise ValueError(
                f"this head was trained for another target ({self.target_name}): {'; '.join(differing)}. "
                f"Serve it with --target {self.target_name}, or train a head for this target"
            )


def manifest_path(directory: Path) -> Path:
    """Where the manifest of the head in ``directory`` lies.

    Raises:
        ValueError: no such directory, or no head of ours in it.
    """
    path = Path(directory) / MANIFEST_NAME
    if not Path(directory).is_dir():
        raise ValueError(f"head directory {directory} does not exist; train one with `specdec train --out {directory}`")
    if not path.is_file():
        raise ValueError(f"{directory} holds no {MANIFEST_NAME}: not a head exported by `specdec train`")
    return path
