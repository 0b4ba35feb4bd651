#!/usr/bin/env bash
# From which concurrency on does speculation stop paying, and does the cost model foretell it? Plain and K = 3 over a sweep.
# About 12 minutes on 2 cores, resumable.
#   experiments/break_even/run.sh [HEAD_DIR [PROMPTS]]                     (default: the demo's head, 32)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -m specdec eval --out runs/break_even --suite reasoning-gym --concurrency 1,2,4,8,16 \
    --arm plain=plain --arm k3=head="$head" \
    --set eval.num_prompts="${2:-32}" --set eval.max_new_tokens=64 --set eval.repeats=3 --set eval.sampled=false \
    --set eval.distribution_samples=0 --set eval.prompt_excerpts=false \
    --set serve.max_model_len=1024 --set serve.max_num_seqs=16 --set serve.kv_cache_gib=1
cp runs/break_even/{result.json,report.html,summary.md} experiments/break_even/
