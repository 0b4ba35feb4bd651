"""Target features on disk: a file for each shard of rows and each layer, so that heads share what they both tap.

``DIR/<key>/00007.layer-15.safetensors`` holds the residual stream after 15 layers for the rows of shard 7, and
``00007.final.safetensors`` what follows the final norm, with logsumexp and argmax of the target's distribution. The
key is made of the target's fingerprint, its dtype and the rows' ids. Values are kept in the target's dtype, which is
exact; argmax as int32. Beside each file lies its checksum, as ``sha256sum -c`` reads it. Files appear whole or not at
all; ``DIR`` never grows beyond its bound; processes that fill it at the same time share the work.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from draft_training.mapped_file import MappedFile
from specdec.manifest import TargetFingerprint
from specdec.progress import progress_bar
from specdec.record import file_sha256, text_sha256
from specdec.traces import TokenRow

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**26  # of one layer; a longer row is a shard of its own
HEADER_BYTES = 1024  # more than a safetensors header of three tensors and its checksum file take
FINAL = "final"


@dataclass(kw_only=True, slots=True)
class RowFeatures:
    """Of tokens ``begin`` .. ``begin`` + T of a row: aux [T, A, H] and final [T, H] in the target's dtype, float32
    logsumexp [T], argmax [T]."""

    aux_hidden: Tensor
    final_hidden: Tensor
    logsumexp: Tensor
    argmax: Tensor
    begin: int = 0

    @property
    def num_bytes(self) -> int:
        tensors = (self.aux_hidden, self.final_hidden, self.logsumexp, self.argmax)
        return sum(t.numel() * t.element_size() for t in tensors)


Compute = Callable[[list[int], list[int]], Iterator[tuple[int, RowFeatures]]]  # rows, layers -> (row, its features)


class FeatureCache:
    """The features of ``rows`` under ``root``."""

    def __init__(
        self, root: Path, max_bytes: int, target: TargetFingerprint, dtype: torch.dtype, rows: Sequence[TokenRow]
    ) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.hidden_size, self.dtype = target.hidden_size, dtype
        digest, self.lengths = hashlib.sha256(), []
        for row in rows:
            self.lengths.append(len(row.input_ids))
            digest.update(len(row.input_ids).to_bytes(8, "big") + np.array(row.input_ids, dtype="<i4").tobytes())
        facts = {"target": dataclasses.asdict(target), "dtype": str(dtype), "rows_sha256": digest.hexdigest()}
        self.facts = {**facts, "num_rows": len(rows), "num_tokens": sum(self.lengths)}
        self.folder = root / text_sha256(json.dumps(facts, sort_keys=True))[:16]
        self.shards = self._plan_shards()
        self._places = {row: place for number, shard in enumerate(self.shards) for row, place in self._offsets(number)}
        self._files: dict[tuple[int, str], MappedFile] = {}  # whole ones

    def _plan_shards(self) -> list[list[int]]:
        """Longest rows first: they cost the target most."""
        tokens = SHARD_BYTES // (self.hidden_size * self.dtype.itemsize)
        shards: list[list[int]] = []
        room = 0
        for row in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            if not shards or self.lengths[row] > room:
                shards.append([])
                room = tokens
            shards[-1].append(row)
            room -= self.lengths[row]
        return shards

    def _offsets(self, number: int) -> Iterator[tuple[int, tuple[int, int]]]:
        offset = 0
        for row in self.shards[number]:
            yield row, (number, offset)
            offset += self.lengths[row]

    def holds(self, row: int, aux_layer_ids: list[int]) -> bool:
        """Whether ``fill`` has put this row's features here."""
        number, _ = self._places[row]
        return all((number, part) in self._files for part in _parts(aux_layer_ids))

    def read(self, row: int, begin: int, end: int, aux_layer_ids: list[int]) -> RowFeatures | None:
        """Features of tokens ``begin`` .. ``end`` of a row, on the CPU; None when they are not here."""
        if not self.holds(row, aux_layer_ids):
            return None
        number, offset = self._places[row]
        span = offset + begin, offset + end
        final, *layers = [self._files[number, part] for part in _parts(aux_layer_ids)]
        final_hidden = final.rows("final_hidden", *span)
        aux = [layer.rows("hidden", *span) for layer in layers]
        return RowFeatures(
            aux_hidden=torch.stack(aux, dim=1) if aux else final_hidden[:, None][:, :0],
            final_hidden=final_hidden,
            logsumexp=final.rows("logsumexp", *span),
            argmax=final.rows("argmax", *span).long(),
            begin=begin,
        )

    def fill(self, compute: Compute, aux_layer_ids: list[int], description: str) -> None:
        """Check what is there, and make what is missing while it fits the bound.

        Raises:
            ValueError: the folder can't be written, or its disk has less room than the bound allows.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_room(aux_layer_ids)
            if not (self.folder / "about.json").exists():
                self._write(self.folder / "about.json", json.dumps(self.facts, indent=2).encode() + b"\n")
            self._fill(compute, aux_layer_ids, description)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise ValueError(
                    f"cannot use the feature cache {self.root} ({error}): set train.feature_cache_dir to a folder that "
                    "can be written"
                ) from error
            raise self._no_room(self._missing_bytes(aux_layer_ids)) from error

    def _fill(self, compute: Compute, aux_layer_ids: list[int], description: str) -> None:
        num_kept = 0
        busy: list[int] = []
        with progress_bar(description, len(self.lengths)) as advance:
            for numbers, wait in ((range(len(self.shards)), False), (busy, True)):
                for number in numbers:
                    with _locked(self.folder / f"{number:05d}.lock", wait) as mine:
                        if not mine:  # another process makes it: see to the others first
                            busy.append(number)
                            continue
                        kept = self._make(number, compute, aux_layer_ids)
                    num_kept += len(self.shards[number]) if kept else 0
                    advance(len(self.shards[number]), f"{_gib(self._used_bytes())} on disk")
        if num_kept < len(self.lengths):
            logger.warning(
                "the feature cache %s is full: features of %d of %d rows are computed whenever they are drawn; "
                "train.feature_cache_gib=%.2f would hold all",
                self.root, len(self.lengths) - num_kept, len(self.lengths),
                (self._used_bytes() + self._missing_bytes(aux_layer_ids)) / 2**30,
            )  # fmt: skip

    def _make(self, number: int, compute: Compute, aux_layer_ids: list[int]) -> bool:
        """Open a shard's files, computing those that are missing or damaged; False: no room for all of them."""
        missing = []
        for part in _parts(aux_layer_ids):
            path = self._path(number, part)
            _partial(path).unlink(missing_ok=True)  # of a process that was killed: the lock is ours
            if path.exists() and not _is_whole(path):
                logger.warning("%s is damaged (its checksum differs): computed again", path)
                path.unlink()
            if path.exists():
                self._open(number, part)
            else:
                missing.append(part)
        if not missing:
            return True
        if self._used_bytes() + self._shard_bytes(number, missing) > self.max_bytes:
            return False
        layers = [layer for layer in aux_layer_ids if _layer(layer) in missing]
        features = dict(compute(self.shards[number], layers))
        return all(self._save(number, part, features, layers) for part in missing)

    def _save(self, number: int, part: str, features: dict[int, RowFeatures], layers: list[int]) -> bool:
        ordered = [features[row] for row in self.shards[number]]
        if part == FINAL:
            tensors = {
                "final_hidden": torch.cat([f.final_hidden for f in ordered]),
                "logsumexp": torch.cat([f.logsumexp for f in ordered]),
                "argmax": torch.cat([f.argmax for f in ordered]).int(),
            }
        else:
            place = [_layer(layer) for layer in layers].index(part)
            tensors = {"hidden": torch.cat([f.aux_hidden[:, place] for f in ordered])}
        blob = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        path = self._path(number, part)
        checksum = f"{hashlib.sha256(blob).hexdigest()}  {path.name}\n".encode()
        written = self._write(path, blob, checksum)
        if written:
            self._open(number, part)
        return written

    def _write(self, path: Path, blob: bytes, checksum: bytes = b"") -> bool:
        """Whole or not at all, and only within the bound."""
        with _locked(self.root / ".lock", wait=True):
            if self._used_bytes() + len(blob) + len(checksum) > self.max_bytes:
                return False
            if checksum:
                _checksum_path(path).write_bytes(checksum)
            try:
                with _partial(path).open("wb") as file:
                    file.write(blob)
                    file.flush()
                    os.fsync(file.fileno())
                _partial(path).replace(path)
            finally:
                _partial(path).unlink(missing_ok=True)
        return True

    def _open(self, number: int, part: str) -> None:
        self._files[number, part] = MappedFile(self._path(number, part))

    def _path(self, number: int, part: str) -> Path:
        return self.folder / f"{number:05d}.{part}.safetensors"

    def _check_room(self, aux_layer_ids: list[int]) -> None:
        wanted = min(self._missing_bytes(aux_layer_ids), self.max_bytes - self._used_bytes())
        if wanted > shutil.disk_usage(self.root).free:
            raise self._no_room(wanted)

    def _no_room(self, wanted: int) -> ValueError:
        free = shutil.disk_usage(self.root).free
        return ValueError(
            f"no room for the feature cache in {self.root}: {_gib(wanted)} are still to be written, {_gib(free)} are "
            "free. Free some space, set train.feature_cache_dir to another disk, or set train.feature_cache_gib to at "
            f"most {(self._used_bytes() + free) / 2**30:.2f} (the rest is then computed when drawn)"
        )

    def _used_bytes(self) -> int:
        """All of the folder, other rows' and targets' features too."""
        return sum(size for path in self.root.rglob("*") if (size := _size(path)))

    def _missing_bytes(self, aux_layer_ids: list[int]) -> int:
        parts = _parts(aux_layer_ids)
        missing = [[part for part in parts if not self._path(n, part).exists()] for n in range(len(self.shards))]
        return sum(self._shard_bytes(number, wanted) for number, wanted in enumerate(missing))

    def _shard_bytes(self, number: int, parts: list[str]) -> int:
        num_tokens = sum(self.lengths[row] for row in self.shards[number])
        hidden = num_tokens * self.hidden_size * self.dtype.itemsize
        return sum(HEADER_BYTES + hidden + (8 * num_tokens if part == FINAL else 0) for part in parts)


def _parts(aux_layer_ids: list[int]) -> list[str]:
    return [FINAL, *map(_layer, aux_layer_ids)]


def _layer(layer_id: int) -> str:
    return f"layer-{layer_id}"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _checksum_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    try:
        wanted = _checksum_path(path).read_text().split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        return False
    return file_sha256(path) == wanted


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # renamed by another process in between
        return 0


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock was got; it always is with ``wait``."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
