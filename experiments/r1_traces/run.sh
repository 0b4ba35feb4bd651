#!/usr/bin/env bash
# Real R1 traces in, a head out: are the rows' masks right, and what does the head accept in thought and answer, and along
# the chain? An EAGLE-3 head for the embedded target on traces of other models, whose soft labels are the target's own.
# Scaled down for two cores: a few hundred of the traces and two epochs. About 20 minutes, resumable.
#   experiments/r1_traces/run.sh [TRACES [ROWS [EPOCHS]]]      (default: r1_traces.jsonl.gz of SPECDEC_DATA_DIR, 160, 2)
set -euo pipefail
cd "$(dirname "$0")/../.."
traces=${1:-${SPECDEC_DATA_DIR:?set it to the folder with r1_traces.jsonl.gz, or give a file of traces}/r1_traces.jsonl.gz}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=.venv/bin/python
[ -x "$python" ] || python=python3
work=runs/r1_traces/${2:-160}-rows
"$python" -m specdec prepare --traces "$traces" --out "$work/rows" --set traces.max_rows="${2:-160}"
"$python" -m specdec train --traces "$work/rows" --head eagle3 --out "$work/head-${3:-2}-epochs" \
    --set train.epochs="${3:-2}" --set train.num_evals=3
"$python" experiments/r1_traces/verdict.py "$traces" "$work/rows" "$work/head-${3:-2}-epochs"
