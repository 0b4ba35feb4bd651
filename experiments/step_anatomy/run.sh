#!/usr/bin/env bash
# Where does the time of a speculative step go? Clocks around its parts in the engine's process and in the worker, for a
# plain server, one that drafts as vLLM does by itself (uncut) and one as specdec starts it (spec), side by side at batch 1 and
# 16. About 8 minutes on 2 cores, resumable.
#   experiments/step_anatomy/run.sh [HEAD_DIR [PROMPTS]]                   (default: the demo's head, 32)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export SPECDEC_ANATOMY=$PWD/runs/step_anatomy/clocks
here=experiments.step_anatomy
clocks=vllm.worker-extension-cls=$here.worker.Worker,vllm.scheduler-cls=$here.scheduler.timed
uncut=vllm.worker-extension-cls=$here.uncut.Worker,vllm.scheduler-cls=$here.scheduler.uncut
"$python" -m specdec eval --out runs/step_anatomy --suite reasoning-gym --concurrency 1,16 \
    --arm plain="$clocks" --arm uncut="head=$head,$uncut" --arm spec="head=$head,$clocks" \
    --set eval.num_prompts="${2:-32}" --set eval.max_new_tokens=48 --set eval.repeats=1 --set eval.sampled=false \
    --set eval.distribution_samples=0 \
    --set serve.max_model_len=1024 --set serve.max_num_seqs=16 --set serve.kv_cache_gib=1
"$python" experiments/step_anatomy/verdict.py
