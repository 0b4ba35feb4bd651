#!/usr/bin/env bash
# A thousand requests of every kind at once, good and bad, while the policy changes: does the server stay up, answer each
# with the status that it deserves, and greedy ones and those with a seed as plain decode does? Then its engine is killed under
# load. 10 to 17 minutes on 2 cores; starts from the beginning.
#   experiments/mixed_load/run.sh [HEAD_DIR [REQUESTS]]                    (default: the demo's head, 1000)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" experiments/mixed_load/run.py \
    --head "${1:-runs/demo/head}" --requests "${2:-1000}"
