#!/usr/bin/env bash
# Does the instrument find a planted 10 % slowdown, a planted loss of 5 % of the drafts and a lenient sampler, and
# nothing where nothing is? Five servers of one head, side by side; about 40 minutes on 2 cores, resumable. Scaled down
# to 32 prompts of 64 tokens, three times.
#   experiments/planted/run.sh [HEAD_DIR [PROMPTS]]                 (default: the demo's head, 32)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
prompts=${2:-32}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=.venv/bin/python
[ -x "$python" ] || python=python3
plant=head=$head,vllm.scheduler-cls=experiments.planted.plant

"$python" -m specdec eval --out runs/planted --suite reasoning-gym \
    --arm spec=head="$head" --arm same=head="$head" \
    --arm slow="$plant.slow" --arm drafts="$plant.drafts" --arm sampler="$plant.sampler" \
    --set serve.max_model_len=1024 --set serve.max_num_seqs=16 --set serve.kv_cache_gib=1 \
    --set eval.num_prompts="$prompts" --set eval.max_new_tokens=64 --set eval.repeats=3 --set eval.sampled=false \
    --set eval.distribution_samples=128 --set eval.distribution_prompts=6
"$python" experiments/planted/verdict.py runs/planted
