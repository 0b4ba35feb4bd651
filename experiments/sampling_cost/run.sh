#!/usr/bin/env bash
# What does top-p cost on a CPU, by vLLM's own sort and without it (serving/nucleus.py)? About 10 minutes on 2 cores.
#   experiments/sampling_cost/run.sh [ROUNDS]                                             (default: 7 rounds)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$PWD "$python" experiments/sampling_cost/sampling_cost.py "${1:-7}"
