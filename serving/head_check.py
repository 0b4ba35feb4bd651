"""Whether a head may take the place of the one that a server runs, by both heads' files. Loads no weights.

A running head's tensors keep their places and shapes, and what vLLM has read of its config stays built in. So a
successor must agree in both; anything else needs a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.doctor import diagnose
from specdec.doctor.files import HeadFiles
from specdec.manifest import HeadManifest
from specdec.targets import Target

Layout = dict[str, tuple[str, list[int]]]  # tensor -> dtype as safetensors spells it, shape
RESTART = "restart the server with it"
BESIDE_THE_POINT = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")  # keys that compute nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningHead:
    """The head that a server was started with, as its files said then."""

    manifest: HeadManifest
    config: dict[str, Any]
    layout: Layout

    @classmethod
    def read(cls, directory: Path) -> RunningHead:
        """Read manifest, config and the tensors' headers.

        Raises:
            ValueError: one of them is missing or damaged.
        """
        files = HeadFiles.read(directory)
        layout = {name: (entry.dtype, list(entry.shape)) for name, entry in files.tensors.items()}
        return cls(manifest=HeadManifest.load(directory), config=files.config, layout=layout)

    def check_successor(self, directory: Path, target: Target, num_speculative_tokens: int) -> RunningHead:
        """The head in ``directory``, which can be swapped in where K is at most ``num_speculative_tokens``.

        Raises:
            ValueError: why it can't, and what to do.
        """
        successor = RunningHead.read(directory)
        if not any(directory.glob("*.safetensors")):
            raise ValueError(f"{directory} holds no .safetensors, which a swap reads: save its weights as such")
        findings = diagnose(directory, target)
        if findings:
            more = f" (and {len(findings) - 1} more: specdec doctor {directory})" if len(findings) > 1 else ""
            raise ValueError(f"the doctor finds in {directory}: {findings[0].what}; {findings[0].fix}{more}")
        for what, ours, theirs in self._differences(successor):
            raise ValueError(
                f"{directory} does not fit the running head: {what} is {theirs}, the running one has {ours}; {RESTART}"
            )
        trained = successor.manifest.num_speculative_tokens
        if trained < num_speculative_tokens:
            raise ValueError(
                f"{directory} was trained for {trained} draft tokens, this server drafts up to "
                f"{num_speculative_tokens}; {RESTART}"
            )
        return successor

    def _differences(self, other: RunningHead) -> list[tuple[str, Any, Any]]:
        """What differs, the plainest first: its name, the running head's, the other's."""
        architecture = [
            (name, getattr(self.manifest, name), getattr(other.manifest, name))
            for name in ("head", "vllm_method", "vllm_speculative", "draft_vocab_size")
        ]
        keys = [key for key in sorted({*self.config, *other.config}) if key not in BESIDE_THE_POINT]
        config = [(f"{key} in config.json", self.config.get(key), other.config.get(key)) for key in keys]
        names = sorted({*self.layout, *other.layout})
        tensors = [(f"tensor {name}", _text(self.layout.get(name)), _text(other.layout.get(name))) for name in names]
        return [each for each in (*architecture, *config, *tensors) if each[1] != each[2]]


def _text(entry: tuple[str, list[int]] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {entry[1]}"
