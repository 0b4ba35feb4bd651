#!/usr/bin/env bash
# What would a head gain that was right as often as one wishes? Plain decode, and K = 3 at vLLM's synthetic acceptance
# lengths of 1 (no draft taken), 2, 3 and 4 (every draft taken: the ceiling), at several requests at a time.
# About 12 minutes on 2 cores, resumable; 48 prompts give intervals at 4 and 8 too, in half an hour. No claim about any
# head: it only lends its cost.
#   experiments/cost_surface/run.sh [HEAD_DIR [PROMPTS]]                   (default: the demo's head, 16)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
arms=(--arm plain=plain)
for length in 1 2 3 4; do
    arms+=(--arm "tau$length=head=$head,k=3,synthetic=$length")
done
"$python" -m specdec eval --out runs/cost_surface --suite reasoning-gym --concurrency 1,4,8 "${arms[@]}" \
    --set eval.num_prompts="${2:-16}" --set eval.max_new_tokens=64 --set eval.repeats=2 --set eval.sampled=false \
    --set eval.distribution_samples=0 --set eval.prompt_excerpts=false \
    --set serve.max_model_len=1024 --set serve.max_num_seqs=8 --set serve.kv_cache_gib=1
cp runs/cost_surface/{result.json,report.html,summary.md} experiments/cost_surface/
