"""``specdec demo``: the three stages as the commands a user would type, one process each, sized for two cores."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

# The embedded target on a CPU, end to end in minutes. Everything else is the tool's own default.
DEMO_SETTINGS = (
    "target.name=smollm2-135m",
    "traces.num_prompts=200",
    "traces.max_new_tokens=128",
    "traces.temperature=0.0",
    "traces.val_fraction=0.05",
    "head.options.draft_vocab_size=2048",
    "train.epochs=5",
    "train.num_evals=3",
    "serve.max_model_len=1024",
    "serve.max_num_seqs=4",
    "serve.kv_cache_gib=1",
    "eval.num_prompts=8",
    "eval.max_new_tokens=128",
    "eval.distribution_samples=0",  # the two-sample test takes minutes on two cores
)


def run_demo(out: Path, config: Path | None, overrides: list[str]) -> int:
    """Run the stages in order; each resumes by itself. Returns the exit code of the first that fails, else 0."""
    settings = [item for setting in (*DEMO_SETTINGS, *overrides) for item in ("--set", setting)]
    shared = [*(["--config", str(config)] if config else []), *settings]
    rows, head = out / "rows", out / "head"
    stages = {
        "prepare": ["prepare", "--out", str(rows)],
        "train": ["train", "--traces", str(rows), "--head", "eagle3", "--out", str(head)],
        "eval": ["eval", "--head", str(head), "--prompts", str(rows / "val_prompts.jsonl"), "--out", str(out)],
    }
    seconds = {}
    for name, arguments in stages.items():
        started = time.monotonic()
        logger.info("specdec %s", " ".join(arguments))
        code = subprocess.run([sys.executable, "-m", "specdec", *arguments, *shared], stdout=subprocess.PIPE).returncode
        if code != 0:
            return code
        seconds[name] = round(time.monotonic() - started)
    logger.info("seconds: %s", json.dumps(seconds))
    sys.stdout.write((out / "report.html").as_posix() + "\n")
    return 0
