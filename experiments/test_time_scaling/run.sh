#!/usr/bin/env bash
# What do more thinking and more samples buy, and at what price with and without speculation? Thinking budgets by samples per prompt.
# Scaled down: the embedded target does not reason, so its accuracies are a check of the way, no claim. About 10 minutes on
# 2 cores, resumable.
#   experiments/test_time_scaling/run.sh [HEAD_DIR [PROMPTS [BUDGETS [SAMPLES]]]]      (default: the demo's head, 12, 32,128, 1,4)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -m specdec eval --out runs/test_time_scaling --suite reasoning-gym --arm plain=plain --arm eagle3=head="$head" \
    --thinking-budget "${3:-32,128}" --samples "${4:-1,4}" --concurrency 4 --price-per-hour 0.10 \
    --set eval.num_prompts="${2:-12}" --set eval.max_new_tokens=48 --set eval.repeats=1 --set eval.distribution_samples=0 \
    --set eval.prompt_excerpts=false --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
cp runs/test_time_scaling/{result.json,report.html,summary.md} experiments/test_time_scaling/
