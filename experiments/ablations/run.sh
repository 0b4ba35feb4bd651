#!/usr/bin/env bash
# Which switch of the training recipe pays? eagle3 on the demo's rows, every switch flipped alone, several seeds.
# At most an hour on 2 cores: it stops in time, keeps what is finished, and goes on when started again.
#   experiments/ablations/run.sh [ROWS_DIR [SEEDS [MINUTES]]]          (default: the demo's rows, 3, 60)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -m experiments.ablations.ablate "${1:-runs/demo/rows}" --seeds "${2:-3}" --minutes "${3:-60}"
