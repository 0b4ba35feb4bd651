#!/usr/bin/env bash
# Rows padded side by side or packed into strips (train.pack_tokens): which trains faster, on short rows and on long ones,
# and which learns more from the same epochs? And what is gained where only the keys are scored that can be seen? About 20 minutes on 2 cores, resumable (rm -r runs/packing starts anew).
#   experiments/packing/run.sh [SEEDS [SHORT_ROWS [LONG_ROWS]]]     (default: 3, the demo's rows, those of r1_traces/run.sh)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
short=${2:-runs/demo/rows}
long=${3:-runs/r1_traces/160-rows/rows}
mkdir -p runs/packing
"$python" -m experiments.ablations.ablate "$short" --arms default packed --seeds "${1:-3}" --minutes 60 \
    --work runs/packing/arms --out runs/packing
"$python" -m experiments.packing.speed "$short:1024" "$long:4096" --acceptance runs/packing/result.json
