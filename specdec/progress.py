"""One look for long work: a rich bar on stderr with ETA and a figure; plain lines when it is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from specdec.device import process_rank

LINE_EVERY_SEC = 20.0


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield ``advance(steps=1, note="")``; of several processes that train together, the first one shows it."""
    if process_rank():
        yield lambda steps=1, note="": None
        return
    bar = _rich_bar(description, total) if sys.stderr.isatty() else _plain_lines(description, total)
    with bar as advance:
        yield advance


@contextmanager
def _plain_lines(description: str, total: int) -> Iterator[Callable[..., None]]:
    done, started, last_line = 0, time.monotonic(), time.monotonic()

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last_line
        done += steps
        now = time.monotonic()
        if done >= total or now - last_line >= LINE_EVERY_SEC:
            last_line = now
            eta_sec = (now - started) / max(done, 1) * (total - done)
            sys.stderr.write(f"{description}: {done}/{total} {note} ({now - started:.0f} s, ETA {eta_sec:.0f} s)\n")
            sys.stderr.flush()

    yield advance


@contextmanager
def _rich_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, note="")
        yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)
