"""Train every arm with every seed, seed by seed, within a time; then say what won.

python -m experiments.ablations.ablate ROWS_DIR [--seeds N] [--minutes M] [--set section.key=value ...]

Finished runs are kept under ``--work`` and an interrupted one resumes; the table can be made from them at any time.
Writes result.json and result.md beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from draft_training.interrupt import Interrupted
from experiments.ablations.arms import ARMS, ArmRun, Bench, arm_config, train_arm
from experiments.ablations.verdict import judge, markdown
from specdec.config import from_dict
from specdec.record import provenance, write_json_atomic


def run_all(
    bench: Bench, arms: list[str], num_seeds: int, minutes: float, overrides: list[str], work: Path
) -> list[ArmRun]:
    """All seeds of the default and of every arm, one seed of all before the next, until the time is up.

    Raises:
        ValueError: ``work`` holds a run with other settings or rows.
        Interrupted: stopped by a signal.
    """
    started, durations, finished = time.monotonic(), [], []
    plan = [(arm, seed) for seed in range(num_seeds) for arm in arms]
    for number, (arm, seed) in enumerate(plan):
        config = arm_config(arm, seed, overrides)
        path = work / f"{arm}-seed{seed}.json"
        if path.is_file():
            run = from_dict(ArmRun, json.loads(path.read_text()))
            if run.identity != bench.identity(config):
                raise ValueError(f"{path} is of other settings or rows; pass another --work, or delete {work}")
            finished.append(run)
            continue
        if time.monotonic() - started + max(durations, default=0.0) > minutes * 60:
            say(f"{minutes:g} minutes are up before {arm}, seed {seed}; start again to go on")
            break
        begun = time.monotonic()
        run = train_arm(bench, arm, config, work / path.stem)
        write_json_atomic(path, dataclasses.asdict(run))
        shutil.rmtree(work / path.stem)
        finished.append(run)
        durations.append(time.monotonic() - begun)
        left = sum(not (work / f"{a}-seed{s}.json").is_file() for a, s in plan[number + 1 :])
        eta_sec = left * sum(durations) / len(durations)
        say(f"{number + 1}/{len(plan)} {arm}, seed {seed}: τ {run.acceptance_length:.3f} (ETA {eta_sec / 60:.0f} min)")
    return finished


def summary(run: ArmRun) -> dict[str, Any]:
    """Without each draft's count: that stays in the work folder."""
    return {key: value for key, value in dataclasses.asdict(run).items() if key != "accepted_by_conversation"}


def say(line: str) -> None:
    """Progress goes to stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--arms", nargs="+", metavar="ARM", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    try:
        bench = Bench(options.rows, options.overrides)
        finished = run_all(bench, options.arms, options.seeds, options.minutes, options.overrides, options.work)
    except Interrupted:
        say("stopped; run the same command to continue")
        return 2
    except ValueError as error:
        say(f"error: {error}")
        return 2
    if not finished:
        say("nothing is finished yet: give it more --minutes")
        return 2
    found = judge(finished)
    facts = provenance(
        target=bench.target.name,
        rows_sha256=bench.rows_sha256,
        num_train_rows=len(bench.rows["train"]),
        num_held_out_rows=len(bench.rows["val"]),
        settings=options.overrides,
        num_seeds=options.seeds,
    )
    runs = [summary(run) for run in finished]
    write_json_atomic(options.out / "result.json", {**found, "runs": runs, "provenance": facts})
    (options.out / "result.md").write_text(markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
