"""Clocks around the parts of a step, in whichever process this is imported.

Times are exclusive: what an inner clock counts is taken from the outer one. They are kept for steps that only decode,
by batch size and tokens verified a sequence, and written now and then to ``$SPECDEC_ANATOMY/PROCESS.json``.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

WRITE_EVERY = 50
PERIOD = "from step to step"


class Clocks:
    """One a process."""

    def __init__(self, process: str) -> None:
        self.process = process
        self.key: str | None = None  # of the step that runs; None: it also reads a prompt
        self.children_sec: list[float] = []  # of each open clock
        self.step: dict[str, float] = defaultdict(float)
        self.steps: dict[str, list[dict[str, float]]] = defaultdict(list)
        self.num_steps = 0
        self.begun_sec = 0.0

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Time ``owner.name`` as part ``label``."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self.children_sec.append(0.0)
            try:
                return inner(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - begun
                self.step[label] += seconds - self.children_sec.pop()
                if self.children_sec:
                    self.children_sec[-1] += seconds

        setattr(owner, name, timed)

    def begin(self, scheduled: Any) -> None:
        """A step begins: keep the last one's times, and see what kind this one is."""
        now = time.perf_counter()
        self.step[PERIOD] = now - self.begun_sec
        self.begun_sec = now
        if self.key is not None:
            self.steps[self.key].append(dict(self.step))
            self.num_steps += 1
            if self.num_steps % WRITE_EVERY == 0:
                self.write()
        self.step.clear()
        drafts, tokens = scheduled.scheduled_spec_decode_tokens, scheduled.num_scheduled_tokens
        widths = {len(drafts.get(request_id, ())) for request_id in tokens}
        decodes = all(count == 1 + len(drafts.get(request_id, ())) for request_id, count in tokens.items())
        steady = len(widths) == 1 and decodes and not scheduled.scheduled_new_reqs
        self.key = f"batch {len(tokens)}, verified {1 + widths.pop()}" if steady else None

    def write(self) -> None:
        folder = Path(os.environ["SPECDEC_ANATOMY"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.process}.json").write_text(json.dumps(self.steps))
