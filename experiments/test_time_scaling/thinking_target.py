"""The embedded target with a chat template that opens the think tag, as those of reasoning models do.

    python experiments/test_time_scaling/thinking_target.py OUT_DIR

It has not learnt to reason, and never closes the tag by itself: so a thinking budget must.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from specdec.config import TargetConfig
from specdec.targets import resolve_target

GENERATION = "<|im_start|>assistant\n"


def main() -> None:
    out = Path(sys.argv[1])
    left_behind = shutil.ignore_patterns("specdec-target.json")
    shutil.copytree(resolve_target(TargetConfig()).path, out, ignore=left_behind, dirs_exist_ok=True)
    path = out / "chat_template.jinja"
    text = path.read_text()
    if GENERATION not in text:
        sys.exit(f"{path} does not begin an answer with {GENERATION!r}")
    path.write_text(text.replace(GENERATION, f"{GENERATION}<think>\n"))


if __name__ == "__main__":
    main()
