"""Rows arrive whole, the disk's bound holds, nobody else can read them, and a bad disk harms nothing."""

from __future__ import annotations

import json
import stat
import time

import pytest

from serving.traffic import NUM_FILES, TrafficLog


def rows(log: TrafficLog) -> list[dict]:
    return [json.loads(line) for path in log.files() for line in path.read_text().splitlines()]


def test_finished_requests_become_rows_that_only_the_owner_reads(tmp_path):
    log = TrafficLog(tmp_path / "kept", 1.0, 10**6)
    log.finished([1, 2], [3, 4, 5])
    log.finished([1], [])  # aborted before its first token
    log.close()
    assert rows(log) == [{"prompt_ids": [1, 2], "completion_ids": [3, 4, 5]}]
    (path,) = log.files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_folder_stays_within_its_bound_and_keeps_the_newest(tmp_path):
    bound = 16_000
    log = TrafficLog(tmp_path, 1.0, bound)
    for number in range(200):
        log.finished([number] * 20, [number] * 40)
        while log._rows.qsize() > 100:  # slower than the writer
            time.sleep(0.001)
    log.close()
    assert log.num_kept == 200 and log.num_dropped == 0
    assert sum(path.stat().st_size for path in log.files()) <= bound and len(log.files()) <= NUM_FILES
    kept = [row["prompt_ids"][0] for row in rows(log)]
    assert kept == list(range(200 - len(kept), 200)) and len(kept) > 20


def test_a_row_that_is_too_long_is_dropped_and_a_lower_bound_holds_for_what_is_there(tmp_path):
    log = TrafficLog(tmp_path, 1.0, 16_000)
    log.finished([1] * 2000, [2])
    for number in range(60):
        log.finished([number] * 20, [number] * 40)
    log.close()
    assert (log.num_kept, log.num_dropped) == (60, 1)
    less = TrafficLog(tmp_path, 1.0, 6_400)
    for number in range(10):
        less.finished([number] * 20, [number] * 40)
    less.close()
    assert sum(path.stat().st_size for path in less.files()) <= 6_400 and rows(less)[-1]["prompt_ids"][0] == 9


def test_a_share_is_kept_and_a_restart_goes_on(tmp_path):
    log = TrafficLog(tmp_path, 0.25, 10**7, seed=1)
    for _ in range(200):
        log.finished([1], [2])
    log.close()
    assert 30 <= log.num_kept <= 70
    again = TrafficLog(tmp_path, 1.0, 10**7)
    again.finished([8], [9])
    again.close()
    assert len(rows(again)) == log.num_kept + 1


def test_a_disk_that_fails_drops_rows_and_says_so_once(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = TrafficLog(tmp_path, 1.0, 10**6)
    monkeypatch.setattr("serving.traffic.os.open", full)
    for _ in range(3):
        log.finished([1], [2])
    log.close()
    assert (log.num_kept, log.num_dropped) == (0, 3)
    assert caplog.text.count("not kept") == 1


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="between 0 and 1"):
        TrafficLog(tmp_path, 1.5, 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        TrafficLog(tmp_path / "file", 0.5, 10)
