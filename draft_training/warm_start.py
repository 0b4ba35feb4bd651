"""A run that starts from an exported head instead of a new one: the same architecture, options and draft vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.config import HeadConfig, from_dict
from specdec.manifest import HeadManifest
from specdec.record import file_sha256

WEIGHTS_NAME = "model.safetensors"


def head_config_of(directory: Path, given: HeadConfig) -> HeadConfig:
    """How the head in ``directory`` was made, which is how it goes on.

    Raises:
        ValueError: no head of ours, or ``given`` settings that say otherwise.
    """
    made = HeadManifest.load(directory).provenance.get("config", {}).get("head")
    if made is None:
        raise ValueError(f"the manifest of {directory} does not say how it was trained: specdec can't open it")
    config = from_dict(HeadConfig, made, "head.")
    if given not in (HeadConfig(), config):
        raise ValueError(f"{directory} is a {config.name} head with settings of its own: leave out --head and head.*")
    return config


def digest_of(directory: Path) -> str:
    """Of the weights to start from."""
    return file_sha256(directory / WEIGHTS_NAME)


def drafted_tokens(directory: Path, vocab_size: int) -> list[int]:
    """The target ids that the head may draft, ascending."""
    tensors = _tensors(directory)
    if "token_map" in tensors:
        return tensors["token_map"].tolist()
    if "d2t" in tensors:
        return [i + offset for i, offset in enumerate(tensors["d2t"].tolist())]
    return list(range(vocab_size))


def load_weights(head: Any, directory: Path) -> None:
    """Into a head that was built alike.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    import torch

    tensors = _tensors(directory)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise ValueError(f"{directory} holds no {name} of shape {list(parameter.shape)}: it was made otherwise")
            parameter.copy_(tensors[name])


def _tensors(directory: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS_NAME} can't be read ({error}); copy or export it again") from error
