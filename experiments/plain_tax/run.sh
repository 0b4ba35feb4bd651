#!/usr/bin/env bash
# What does K = 0 cost against a server without a head, and does acceptance survive a fallback? As vLLM does it (the head
# runs every step), with the head's forward put off, and with it skipped. The tax is measured in slices of time, at 1, 4, 16
# and 32 requests at a time. About 20 minutes on 2 cores, resumable (rm -r runs/plain_tax starts anew). Scaled down to
# answers of 64 tokens for the tax, and for acceptance to 16 prompts of 96.
#   experiments/plain_tax/run.sh [HEAD_DIR [PROMPTS]]                      (default: the demo's head, 16)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
here=experiments.plain_tax
common=(--suite reasoning-gym --set eval.num_prompts="${2:-16}" --set eval.max_new_tokens=96 --set eval.sampled=false
    --set eval.distribution_samples=0
    --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1)
"$python" experiments/plain_tax/tax.py --head "$head"
turns=head=$head,serve.policy=auto,vllm.scheduler-cls=$here.alternating.alternating
"$python" -m specdec eval --out runs/plain_tax/resume "${common[@]}" --set eval.repeats=1 \
    --arm always="head=$head" --arm every_step="$turns,vllm.worker-extension-cls=$here.every_step.Worker" \
    --arm put_off="$turns" --arm skipped="$turns,vllm.worker-extension-cls=$here.forgetful.Worker"
"$python" experiments/plain_tax/verdict.py
