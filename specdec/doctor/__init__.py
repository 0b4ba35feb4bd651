"""``specdec doctor``: what is wrong with a draft head for a target, above all what vLLM would not tell.

Reads the config and the tensors' headers; loads no weights, and torch only for files of ``torch.save``. Any public
EAGLE-1, EAGLE-3, speculators or Medusa head will do; one that ``specdec train`` exported is also checked against its
manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from specdec.doctor.eagle import check_biases, check_eagle1, check_eagle3, check_rope, check_vocabulary
from specdec.doctor.files import HeadFiles
from specdec.doctor.findings import Finding
from specdec.doctor.medusa import check_medusa
from specdec.hub_files import hub_snapshot, is_repository_name
from specdec.manifest import MANIFEST_NAME, HeadManifest
from specdec.targets import Target

__all__ = ["Finding", "diagnose", "find_head", "kind_of"]

HEAD_FILES = ("*.json", "*.safetensors", "*.bin", "*.pt")


def find_head(name: str) -> Path:
    """A head's directory: ``name`` itself, or its copy of what the Hugging Face hub has under it.

    Raises:
        ValueError: the hub has no such head, or can't be reached.
    """
    if Path(name).exists() or not is_repository_name(name):
        return Path(name)
    return hub_snapshot("head", name, None, HEAD_FILES)


def kind_of(head: HeadFiles) -> str:
    """``eagle``, ``eagle3`` or ``medusa``.

    Raises:
        ValueError: none of them.
    """
    named = " ".join(map(str, head.config.get("architectures") or [])).lower()
    model_type = str(head.config.get("speculators_model_type") or head.config.get("model_type") or "").lower()
    if "medusa" in named or model_type == "medusa" or "medusa_num_heads" in head.config:
        return "medusa"
    fc = head.shape("fc.weight") or head.shape("model.fc.weight")
    if "eagle3" in named or model_type == "eagle3" or "d2t" in head.tensors or (fc and fc[1] > 2 * fc[0]):
        return "eagle3"
    if fc:
        return "eagle"
    raise ValueError(
        f"{head.directory} is no EAGLE or Medusa head that can be told by its config or tensors "
        f"(architectures: {named or 'none'})"
    )


def diagnose(directory: Path, target: Target) -> list[Finding]:
    """Every finding, the gravest kinds first; empty for a clean head.

    Raises:
        ValueError: the head's files can't be read, hold what no head's files hold, or it is of no known kind.
    """
    head = HeadFiles.read(directory)
    try:
        return [*_by_kind(head, target), *_by_manifest(directory, target)]
    except (TypeError, AttributeError, KeyError, IndexError, OSError) as error:
        raise ValueError(
            f"{directory} can't be judged: its files hold something unexpected ({type(error).__name__}: {error}); "
            "compare config.json with that of a head that works"
        ) from error


def _by_kind(head: HeadFiles, target: Target) -> Iterator[Finding]:
    kind = kind_of(head)
    if kind == "medusa":
        yield from check_medusa(head, target.config)
        return
    yield from check_vocabulary(head, target.config)
    yield from (check_eagle3 if kind == "eagle3" else check_eagle1)(head, target.config)
    yield from check_biases(head)
    yield from check_rope(head, target.config)


def _by_manifest(directory: Path, target: Target) -> Iterator[Finding]:
    if not (directory / MANIFEST_NAME).is_file():
        return
    try:
        HeadManifest.load(directory).check_target(target.fingerprint(), target.is_quantised)
    except ValueError as error:
        what, _, fix = str(error).partition(". ")
        yield Finding(code="manifest", what=what, fix=fix or "train a head for this target")
