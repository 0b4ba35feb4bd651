"""Target features on disk: reused, bounded, resumed, checked, and clear about a full disk."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from draft_training import feature_cache
from draft_training.feature_cache import FeatureCache, RowFeatures
from draft_training.features import FeatureStore
from draft_training.mapped_file import MappedFile
from draft_training.target_model import TargetModel
from draft_training.windows import tiles
from specdec.config import TargetConfig
from specdec.device import Device
from specdec.manifest import TargetFingerprint
from specdec.targets import resolve_target
from specdec.traces import TokenRow
from tests.tiny import save_tiny_target

HIDDEN = 8
LARGE = 2**30


def make_row(seed: int, length: int, prompt: int = 4) -> TokenRow:
    ids = torch.randint(0, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenRow(
        conversation_id=str(seed), prompt=str(seed), input_ids=ids, prompt_span=(0, prompt),
        think_span=(prompt, prompt), answer_span=(prompt, length), loss_mask=[0] * prompt + [1] * (length - prompt),
    )  # fmt: skip


ROWS = [make_row(seed, 20 + 7 * seed) for seed in range(10)]
FINGERPRINT = TargetFingerprint(
    architecture="A", hidden_size=HIDDEN, num_hidden_layers=9, vocab_size=200, weights_sha256="w",
    chat_template_sha256="c",
)  # fmt: skip


class Computed:
    """Stands for the target: features that name their row, token and layer, and a count of what was asked."""

    def __init__(self, rows: list[TokenRow] = ROWS) -> None:
        self.rows, self.asked = rows, Counter()
        self.stop_after = len(rows)

    def __call__(self, indices, layers):
        for index in indices:
            if sum(self.asked.values()) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked[index] += 1
            yield index, expected(index, self.rows[index], layers)


def expected(index: int, row: TokenRow, layers: list[int]) -> RowFeatures:
    tokens = torch.arange(len(row.input_ids), dtype=torch.bfloat16)
    final = (index + tokens[:, None] / 64).expand(-1, HIDDEN).contiguous()
    aux = [final + layer for layer in layers]
    return RowFeatures(
        aux_hidden=torch.stack(aux, dim=1) if aux else final[:, None][:, :0],
        final_hidden=final,
        logsumexp=tokens.float() + index,
        argmax=tokens.long() + 1000 * index,
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 100 * HIDDEN * 2)  # 100 tokens


def make_cache(root: Path, max_bytes: int = LARGE, rows: list[TokenRow] = ROWS, **facts) -> FeatureCache:
    target = dataclasses.replace(FINGERPRINT, **facts)
    return FeatureCache(root, max_bytes, target, torch.bfloat16, rows)


def filled(root: Path, layers: list[int], max_bytes: int = LARGE, **facts) -> tuple[FeatureCache, Computed]:
    cache, computed = make_cache(root, max_bytes, **facts), Computed()
    cache.fill(computed, layers, "features")
    return cache, computed


def used(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def assert_same(found: RowFeatures | None, wanted: RowFeatures, begin: int, end: int) -> None:
    assert found is not None and found.begin == begin
    for name in ("aux_hidden", "final_hidden", "logsumexp", "argmax"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)[begin:end]), name


def test_what_is_read_is_what_was_computed_bit_for_bit(tmp_path):
    cache, computed = filled(tmp_path, [2, 5])
    assert len(cache.shards) > 3 and computed.asked == Counter(range(len(ROWS)))
    for index, row in enumerate(ROWS):
        for begin, end in ((0, len(row.input_ids)), (3, 11)):
            assert_same(cache.read(index, begin, end, [2, 5]), expected(index, row, [2, 5]), begin, end)
    assert make_cache(tmp_path).read(0, 0, 5, [2, 5]) is None  # nothing unchecked is given out


def test_the_same_or_fewer_taps_compute_nothing_and_another_one_adds_its_layer_alone(tmp_path):
    filled(tmp_path, [2, 5])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    for layers in ([2, 5], [5], []):
        cache, computed = filled(tmp_path, layers)
        assert not computed.asked
        assert_same(cache.read(1, 0, 9, layers), expected(1, ROWS[1], layers), 0, 9)
    cache, computed = filled(tmp_path, [2, 7])
    assert computed.asked == Counter(range(len(ROWS)))
    assert_same(cache.read(1, 0, 9, [2, 7]), expected(1, ROWS[1], [2, 7]), 0, 9)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {path: after[path] for path in before} == before
    assert all(".layer-7." in path.name for path in after.keys() - before.keys())


def test_another_target_or_other_rows_share_nothing(tmp_path):
    filled(tmp_path, [])
    _, computed = filled(tmp_path, [], weights_sha256="other")
    assert len(computed.asked) == len(ROWS)
    other_rows = [*ROWS[:-1], make_row(99, 30)]
    cache, computed = make_cache(tmp_path, rows=other_rows), Computed(other_rows)
    cache.fill(computed, [], "features")
    assert len(computed.asked) == len(ROWS)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.9])
def test_the_bound_is_never_passed_whoever_else_is_in_the_folder(tmp_path, monkeypatch, share, caplog):
    filled(tmp_path / "whole", [2])
    bound = int(share * 2 * used(tmp_path / "whole"))
    peaks = [0]
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), peaks.append(used(tmp_path / "small"))))
    caches = [filled(tmp_path / "small", [2], bound, weights_sha256=name)[0] for name in ("one", "two")]
    assert max(peaks) <= bound and used(tmp_path / "small") <= bound
    held = [[i for i in range(len(ROWS)) if cache.read(i, 0, 5, [2])] for cache in caches]
    assert 0 < share < 1 and len(held[1]) < len(ROWS) if share else held == [[], []]
    assert (len(held[0]) == len(ROWS)) == (share > 0.5)
    assert "would hold all" in caplog.text


def test_a_killed_fill_keeps_its_finished_shards_and_makes_the_torn_one_again(tmp_path):
    cache, computed = make_cache(tmp_path), Computed()
    computed.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        cache.fill(computed, [2], "features")
    finished = [row for shard in cache.shards for row in shard if cache.read(row, 0, 5, [2])]
    assert 0 < len(finished) <= 4
    torn = feature_cache._partial(cache._path(len(cache.shards) - 1, "final"))
    torn.write_bytes(b"half")
    again, computed = filled(tmp_path, [2])
    assert set(computed.asked) == set(range(len(ROWS))) - set(finished)
    assert not torn.exists()
    assert all(again.read(i, 0, 5, [2]) for i in range(len(ROWS)))


@pytest.mark.parametrize("damage", ["flip", "cut", "checksum"])
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, caplog, damage):
    cache, _ = filled(tmp_path, [2])
    path = cache._path(1, "layer-2")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-7])
    else:
        path.with_suffix(".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        again, computed = filled(tmp_path, [2])
    assert str(path) in caplog.text and "damaged" in caplog.text
    assert set(computed.asked) == set(cache.shards[1])
    for row in cache.shards[1]:
        assert_same(again.read(row, 0, 20, [2]), expected(row, ROWS[row], [2]), 0, 20)


def test_too_little_disk_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    cache, computed = make_cache(tmp_path), Computed()
    with pytest.raises(
        ValueError, match=r"GiB are still to be written.*feature_cache_dir.*feature_cache_gib to at most"
    ):
        cache.fill(computed, [2], "features")
    assert not computed.asked
    make_cache(tmp_path, max_bytes=90).fill(computed, [2], "features")  # within what is free


def test_a_disk_that_fills_up_meanwhile_leaves_what_is_whole(tmp_path, monkeypatch):
    calls = []

    def fsync(_handle):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match="no room for the feature cache"):
        filled(tmp_path, [2])
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    cache = make_cache(tmp_path)
    assert [feature_cache._is_whole(path) for path in tmp_path.rglob("*.safetensors")] == [True, True]
    assert cache.folder.is_dir()


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"set train\.feature_cache_dir to a folder"):
        filled(tmp_path / "file", [2])


def test_two_processes_share_the_work(tmp_path):
    """Locks are those of open files, so threads with their own caches stand for processes."""
    computed = Computed()
    computed.stop_after = 10**6
    caches = [make_cache(tmp_path) for _ in range(3)]
    threads = [threading.Thread(target=cache.fill, args=(computed, [2], "features")) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert computed.asked == Counter(range(len(ROWS)))
    assert all(cache.read(i, 0, 5, [2]) for cache in caches for i in range(len(ROWS)))


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TargetModel:
    files = resolve_target(TargetConfig(name=str(save_tiny_target(tmp_path_factory.mktemp("target")))))
    return TargetModel.load(files, "float32", Device(kind="cpu", core_ids=(0,), native_bf16=False))


def test_batches_are_the_same_from_disk_from_memory_and_computed_when_drawn(target, tmp_path):
    rows = ROWS[:6]
    fingerprint = dataclasses.replace(FINGERPRINT, hidden_size=64)
    disk = FeatureCache(tmp_path, LARGE, fingerprint, torch.float32, rows)
    some = FeatureCache(tmp_path / "some", 150_000, fingerprint, torch.float32, rows)
    stores = [
        FeatureStore(target, rows, [1, 3], LARGE),
        FeatureStore(target, rows, [1, 3], 0),
        FeatureStore(target, rows, [1, 3], 0, disk),
        FeatureStore(target, rows, [1, 3], 0, some),
    ]
    for store in stores:
        store.fill(256, "features")
    on_disk = [some.read(i, 0, 5, [1, 3]) is not None for i in range(len(rows))]
    assert any(on_disk) and not all(on_disk)
    windows = [tiles(i, row, 6, 3, prefix_tokens=4)[1] for i, row in enumerate(rows)]
    wanted, *others = [(store.batch([0, 3, 5]), store.window_batch(windows)) for store in stores]
    for found in others:
        for kind in (0, 1):
            torch.testing.assert_close(dataclasses.asdict(found[kind]), dataclasses.asdict(wanted[kind]))


def resident_bytes(path: Path) -> int:
    """Of this process's mapping of a file."""
    blocks = Path("/proc/self/smaps").read_text().split(str(path))
    return sum(int(block.split("Rss:")[1].split()[0]) * 1024 for block in blocks[1:])


def test_what_was_read_of_a_file_does_not_stay_in_memory(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {"hidden": torch.randn(4096, 512).bfloat16(), "ids": torch.arange(4096, dtype=torch.int32)}
    save_file(tensors, path)
    file = MappedFile(path)
    for name, tensor in tensors.items():
        for begin, end in ((0, 4096), (7, 9), (4095, 4096), (12, 12)):
            assert torch.equal(file.rows(name, begin, end), tensor[begin:end])
    assert path.stat().st_size > 2**22 and resident_bytes(path) == 0
