"""``own.py MARKS train ...``: specdec's own command line; one line a training step goes to MARKS (``turns.Step``)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from draft_training.step import StepFigures
from draft_training.trainer import Trainer
from draft_training.windows import Window
from specdec.cli import main


def mark_steps(path: Path) -> None:
    file = path.open("a", buffering=1)
    train_step = Trainer._train_step

    def marked(self: Trainer, windows: list[Window]) -> StepFigures:
        begin = time.monotonic()
        figures = train_step(self, windows)
        file.write(json.dumps({"begin": begin, "end": time.monotonic(), "tokens": figures.num_tokens}) + "\n")
        return figures

    Trainer._train_step = marked


if __name__ == "__main__":
    mark_steps(Path(sys.argv.pop(1)))
    main()
