"""A load that changes: prompts like the head's training, then of another kind, then like training again.

Three servers take the same prompts in turn: plain, vLLM's own table of K by batch size (the K that was best in
``steady.py``), and the policy, whose status is written down twice a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
import urllib.request
from pathlib import Path

from experiments.never_slower.steady import FIRST_PORT, WORK, evaluate, finished, servers
from experiments.never_slower.verdict import best_table
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import open_arms
from specdec.evaluation.suites import load_suite

CONCURRENCY = 4  # where a draft must gain two thirds of a token to pay
NUM_PROMPTS = 48  # of each phase
TOKENS = 96
# Nothing of it was in the head's training: other languages and free text.
TOPICS = (
    "la mer", "un vieux train", "le marché", "une île", "la neige", "un musicien", "le désert", "une lettre",
    "un jardin", "la pluie", "un phare", "le silence", "un voleur", "une montagne", "le pain", "un miroir",
)  # fmt: skip
FOREIGN = (
    "Écris une courte histoire sur {}.", "Raconte un rêve étrange sur {}.", "Compose un poème en prose sur {}.",
)  # fmt: skip


def phases() -> dict[str, Path]:
    """Prompt files: before, changed, and after, which is before again (no request reuses another's cached prefix)."""
    home = [item.turns[0] for item in load_suite("reasoning-gym", NUM_PROMPTS, seed=11).items]
    foreign = [text.format(topic) for text in FOREIGN for topic in TOPICS]
    prompts = {"before": home, "changed": foreign[:NUM_PROMPTS], "after": home}
    paths = {}
    for name, texts in prompts.items():
        paths[name] = WORK / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return paths


class Watch(threading.Thread):
    """Writes a line of JSON with the server's status twice a second."""

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(daemon=True)
        self.url, self.path, self.phase, self.done = url, path, "", threading.Event()

    def run(self) -> None:
        keys = ("mode", "num_speculative_tokens", "acceptance_length", "goodput_tok_per_sec", "plain_tok_per_sec",
                "fallback_share", "alarm", "conditional_rates")  # fmt: skip
        with self.path.open("w") as lines:
            while not self.done.wait(0.5):
                try:
                    with urllib.request.urlopen(f"{self.url}/specdec/status", timeout=10) as page:
                        status = json.load(page)
                except OSError:  # a moment without an answer leaves a gap, not the rest of the line out
                    continue
                row = {"at_sec": time.time(), "phase": self.phase, **{key: status[key] for key in keys}}
                lines.write(json.dumps(row) + "\n")
                lines.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", type=Path, required=True)
    head = parser.parse_args().head
    outs = {phase: WORK / f"shift-{phase}" for phase in phases()}
    if all(finished(out) for out in outs.values()):
        return
    for out in outs.values():  # a policy carries over what it learned: phases count together only
        shutil.rmtree(out, ignore_errors=True)
    specs, config = servers(head, WORK / "random_head", num_seqs=8)
    table = {"head": str(head), "table": best_table(8), "serve.port": str(FIRST_PORT + 9)}
    specs = [spec for spec in specs if spec.name in ("plain", "auto")] + [ArmSpec(name="table", options=table)]
    with open_arms(specs, config, WORK / "shift-servers") as started:
        watch = Watch(started["auto"].url, WORK / "timeline.jsonl")
        watch.start()
        for phase, path in phases().items():
            watch.phase = phase
            evaluate(
                outs[phase],
                [f"{name}={started[name].url}" for name in ("plain", "auto", "table")],
                f"eval.suites=[{path}]",
                f"eval.concurrency=[{CONCURRENCY}]",
                f"eval.num_prompts={NUM_PROMPTS}",
                f"eval.max_new_tokens={TOKENS}",
                "eval.repeats=1",
                "eval.sampled=false",
                "eval.distribution_samples=0",
            )
        watch.done.set()
        watch.join()


if __name__ == "__main__":
    main()
