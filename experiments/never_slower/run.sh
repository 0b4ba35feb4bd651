#!/usr/bin/env bash
# Is the policy ever slower than plain decode, or than the best fixed K? A trained and a random head, at constant load
# (concurrency 1 to 32, greedy and T = 0.6), and a load whose prompts change to another domain and back. The servers share
# the machine in short slices, so that what else happens on it meets all of them alike. About 65 minutes on 2 cores and
# 20 GB of memory, and 60 for each further life of the servers, which starts from the step times that the one before it
# learned; an interrupted run goes on, more lives add to one that is finished, and
# `rm -r runs/never_slower ~/.cache/specdec/step_times` starts anew, as on a machine that knows nothing of the head.
# What servers that do the same differ by, which no policy can better: `python experiments/never_slower/control.py --head
# HEAD_DIR` (ten minutes more), then `python experiments/never_slower/verdict.py`.
# Scaled down from a real study in tokens a request (a reasoning model writes thousands; the shorter, the more steps read
# prompts), requests (PASSES times as many), lives.
#   experiments/never_slower/run.sh [HEAD_DIR [PASSES [TOKENS [LIVES]]]]   (default: the demo's head, 1, 128, 1)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" experiments/never_slower/overhead.py --head "$head"
"$python" experiments/never_slower/steady.py --head "$head" --passes "${2:-1}" --tokens "${3:-128}" --lives "${4:-1}"
"$python" experiments/never_slower/shift.py --head "$head" --lives "${4:-1}"
"$python" experiments/never_slower/verdict.py
