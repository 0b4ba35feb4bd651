#!/usr/bin/env bash
# What does sampling cost on a CPU? Top-p by vLLM's own sort and without it (serving/nucleus.py), and sampled drafts verified
# by whole rows and by plain decode's draws (serving/plain_draws.py). About 20 minutes on 2 cores.
#   experiments/sampling_cost/run.sh [ROUNDS [HEAD_DIR]]                   (default: 7 rounds, the demo's head)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD
"$python" experiments/sampling_cost/sampling_cost.py "${1:-7}"
"$python" experiments/sampling_cost/verification.py "${2:-runs/demo/head}"
