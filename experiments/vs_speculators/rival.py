"""``rival.py MARKS train ...``: speculators' own command line, on a machine without an accelerator.

Runs in the rival's environment. Four settings make its trainer run on a CPU, everything else is the package as it was
released; one line a training step goes to the file MARKS (see ``turns.Step``), read off its own log of metrics.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

sys.path.pop(0)  # this folder: its modules must not stand in for the package's

import torch
from speculators.cli import app
from speculators.train import checkpointer, trainer


def settle_on_cpu() -> None:
    """Where it asks for the accelerator, it is told the CPU."""
    trainer.get_local_rank = lambda: "cpu"
    trainer.Trainer.device_type = property(lambda self: "cpu", lambda self, _: None)
    checkpointer.get_current_device = lambda: "cpu"
    torch.accelerator.synchronize = lambda *_: None


def mark_steps(path: Path) -> None:
    """One line a training step. A filter, because handlers are dropped when its logging is set up."""
    file = path.open("a", buffering=1)

    def mark(record: logging.LogRecord) -> bool:
        profile = record.msg.get("profile") if isinstance(record.msg, dict) else None
        if profile:
            end, seconds = time.monotonic(), profile["step_ms"] / 1000
            tokens = round(profile["tokens_per_s"] * seconds)
            file.write(json.dumps({"begin": end - seconds, "end": end, "tokens": tokens}) + "\n")
        return True

    logging.getLogger("speculators.metrics").addFilter(mark)


if __name__ == "__main__":
    settle_on_cpu()
    mark_steps(Path(sys.argv.pop(1)))
    app()
