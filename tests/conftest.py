"""What every test shares: nothing reaches the network, and the tests that start a server come last."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from evaluation_runs import quick  # noqa: F401  # a fixture for those that ask for it
from hypothesis import settings

# Before any test imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline: a machine that is busy with a server is slow, not wrong.
settings.register_profile("specdec", max_examples=50, deadline=None)
settings.load_profile("specdec")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job: Ctrl-C would reach nobody's child
    signal.signal(signal.SIGINT, signal.default_int_handler)


def share_cores() -> None:
    """Of tests that run side by side each keeps to cores of its own, and so do the servers that it starts."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % count :: count] or cores)


def pytest_configure(config: pytest.Config) -> None:
    share_cores()
    config.addinivalue_line("markers", "data: reads the folder SPECDEC_DATA_DIR; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)  # stable: the rest keeps its order


def pytest_runtest_setup(item: pytest.Item) -> None:
    folder = os.environ.get("SPECDEC_DATA_DIR")
    if item.get_closest_marker("data") and not (folder and Path(folder).is_dir()):
        pytest.skip("SPECDEC_DATA_DIR names no folder")
