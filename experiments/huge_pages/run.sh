#!/usr/bin/env bash
# What do huge pages give a server on a CPU, and how far do equal servers differ with and without them? Three servers of
# each kind share the machine in slices of time, without a head and with K = 3. About 20 minutes on 2 cores and 16 GB of
# memory, resumable (rm -r runs/huge_pages starts anew). Scaled down to answers of 64 tokens.
#   experiments/huge_pages/run.sh [HEAD_DIR [PASSES]]                      (default: the demo's head, 1)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" experiments/huge_pages/pages.py --head "${1:-runs/demo/head}" --passes "${2:-1}"
