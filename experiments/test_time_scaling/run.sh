#!/usr/bin/env bash
# What do more thinking and more samples buy, and at what price with and without speculation? Thinking budgets by samples per prompt.
# Scaled down: the embedded target, with a template that opens the think tag, does not reason, so its accuracies are a check of
# the way, no claim. A head of the plain template would be refused: n-gram lookup speculates. About 7 minutes on 2 cores, resumable.
#   experiments/test_time_scaling/run.sh [PROMPTS [BUDGETS [SAMPLES]]]                              (default: 12, 32,128, 1,4)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=runs/test_time_scaling
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD
[ -f $out/target/model.safetensors ] || "$python" experiments/test_time_scaling/thinking_target.py $out/target
"$python" -m specdec eval --out $out/eval --target $out/target --suite reasoning-gym --arm plain=plain --arm ngram=method=ngram,k=3 \
    --thinking-budget "${2:-32,128}" --samples "${3:-1,4}" --concurrency 4 --price-per-hour 0.10 \
    --set eval.num_prompts="${1:-12}" --set eval.max_new_tokens=32 --set eval.repeats=1 --set eval.distribution_samples=0 \
    --set eval.prompt_excerpts=false --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
cp $out/eval/{result.json,report.html,summary.md} experiments/test_time_scaling/
