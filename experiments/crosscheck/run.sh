#!/usr/bin/env bash
# Are the instrument's figures those of `vllm bench serve` and of guidellm, on one server, prompts and load?
# Rounds of the three clients in turn; about 30 minutes on 2 cores. Resumable; guidellm gets an environment of its own.
#   experiments/crosscheck/run.sh [HEAD_DIR [ROUNDS [PROMPTS]]]       (default: the demo's head, 14 rounds, 8 prompts,
#                                                                    twice as many four at a time)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
rival=${GUIDELLM_VENV:-runs/crosscheck/guidellm-venv}
if [ ! -x "$rival/bin/guidellm" ]; then
    "$python" -m venv "$rival"
    "$rival/bin/pip" install --quiet --disable-pip-version-check guidellm==0.8.1
fi
for concurrency in 1 4; do
    PYTHONPATH=$PWD "$python" experiments/crosscheck/crosscheck.py --guidellm "$rival/bin/guidellm" \
        --head "${1:-runs/demo/head}" --rounds "${2:-14}" --num-prompts $((${3:-8} * (concurrency > 1 ? 2 : 1))) \
        --concurrency "$concurrency"
done
