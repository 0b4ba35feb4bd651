"""A load that changes: prompts like the head's training, then of another kind, then like training again.

Three servers take the same prompts in slices of time: plain, vLLM's own table of K by batch size (the K that was best
in ``steady.py``), and the policy, whose status is written down as it goes. Each further life is one of servers started
anew, whose policy starts from the step times that the one before it learned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.never_slower.slices import DEV_MODE, Request, SlicedArm, measure
from experiments.never_slower.steady import (
    ADAPTATION_SEC,
    WARM_UP_SEED,
    WORK,
    requests_of,
    servers,
    shift_path,
    timeline_path,
)
from experiments.never_slower.verdict import best_table
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import Arm, open_arms
from specdec.evaluation.suites import load_suite
from specdec.progress import progress_bar
from specdec.record import provenance, write_json_atomic

CONCURRENCY = 8  # where a draft must gain most of a token to pay
NUM_PROMPTS = 96  # of each phase
TOKENS = 96
# Nothing of it was in the head's training: other languages and free text.
TOPICS = (
    "la mer", "un vieux train", "le marché", "une île", "la neige", "un musicien", "le désert", "une lettre",
    "un jardin", "la pluie", "un phare", "le silence", "un voleur", "une montagne", "le pain", "un miroir",
)  # fmt: skip
FOREIGN = (
    "Écris une courte histoire sur {}.", "Raconte un rêve étrange sur {}.", "Compose un poème en prose sur {}.",
    "Décris en détail {}.", "Imagine un dialogue sur {}.", "Écris une lettre d'amour à propos de ceci : {}.",
)  # fmt: skip


def phases() -> dict[str, list[str]]:
    """Prompts before, changed, and after, which is before again (no request reuses another's cached prefix)."""
    home = [item.turns[0] for item in load_suite("reasoning-gym", NUM_PROMPTS, seed=11).items]
    foreign = [text.format(topic) for text in FOREIGN for topic in TOPICS]
    return {"before": home, "changed": foreign[:NUM_PROMPTS], "after": home}


class Watch(threading.Thread):
    """Writes a line of JSON with the server's status each time that it has decoded since the last one."""

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(daemon=True)
        self.url, self.path, self.phase, self.done = url, path, "", threading.Event()

    def run(self) -> None:
        keys = ("mode", "num_speculative_tokens", "acceptance_length", "goodput_tok_per_sec", "plain_tok_per_sec",
                "fallback_share", "alarm", "conditional_rates")  # fmt: skip
        last_sec = -1.0
        with self.path.open("w") as lines:
            while not self.done.wait(0.25):
                try:
                    with urllib.request.urlopen(f"{self.url}/specdec/status", timeout=10) as page:
                        status = json.load(page)
                except OSError:  # a moment without an answer leaves a gap, not the rest of the line out
                    continue
                at_sec = status["totals"]["decode_sec"]
                if at_sec > last_sec:
                    row = {"at_sec": at_sec, "phase": self.phase, **{key: status[key] for key in keys}}
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                    last_sec = at_sec


async def run_phases(started: dict[str, Arm], timeline: Path) -> dict[str, Any]:
    """What each arm did in each phase; the policy keeps what it learned."""
    watch = Watch(started["auto"].url, timeline)
    watch.start()
    arms = [SlicedArm(arm) for arm in started.values()]
    found: dict[str, Any] = {}
    try:
        for phase, prompts in phases().items():
            watch.phase = phase
            requests = [Request(prompt, TOKENS) for prompt in prompts]
            warm_up = requests_of(24, TOKENS, WARM_UP_SEED) if phase == "before" else []
            with progress_bar(f"shift, {phase}", len(arms) * len(requests) * TOKENS) as advance:
                work = await measure(arms, requests, warm_up, CONCURRENCY, 0.0, ADAPTATION_SEC, advance)
            found[phase] = {name: asdict(each) for name, each in work.items()}
    finally:
        watch.done.set()
        watch.join()
        for sliced in arms:
            await sliced.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--lives", type=int, default=1)
    options = parser.parse_args()
    os.environ[DEV_MODE] = "1"
    specs, config = servers(options.head, WORK / "random_head", num_seqs=8)
    specs = [spec for spec in specs if spec.name in ("plain", "auto")]
    for life in range(options.lives):
        if shift_path(life).is_file():
            continue
        table = ArmSpec(name="table", options={"head": str(options.head), "table": best_table(8)})
        with open_arms([*specs, table], config, WORK / f"shift-servers{life}") as started:
            found = asyncio.run(run_phases(started, timeline_path(life)))
            write_json_atomic(shift_path(life), {"phases": found, "provenance": provenance()})


if __name__ == "__main__":
    main()
