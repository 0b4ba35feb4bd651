#!/usr/bin/env bash
# The kinds of arm that no other experiment has, beside plain and a fixed K: suffix lookup at a fixed K and under the policy, and
# 8-bit weights without and with the head. About 12 minutes on 2 cores, resumable; six servers take 16 GiB. Suffix lookup's
# package gets a folder of its own.
#   experiments/other_arms/run.sh [HEAD_DIR [PROMPTS]]                     (default: the demo's head, 8)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
out=runs/other_arms
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD
if [ ! -d $out/suffix ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --target $out/build nanobind==2.9.2 cmake ninja grpcio-tools setuptools wheel
    PATH=$PWD/$out/build/bin:$PATH PYTHONPATH=$PWD/$out/build "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --target $out/suffix arctic-inference==0.3.0
fi
[ -f $out/int8/model.safetensors ] || "$python" experiments/other_arms/quantise.py $out/int8
export PYTHONPATH=$PWD:$PWD/$out/suffix
"$python" -m specdec eval --out $out/eval --suite reasoning-gym --head "$head" \
    --arm plain=plain --arm k3=k=3 --arm suffix=method=suffix,k=3 --arm suffix-policy=method=suffix,k=3,serve.policy=auto \
    --arm int8=target.name=$out/int8 --arm int8-k3=k=3,target.name=$out/int8 \
    --set eval.num_prompts="${2:-8}" --set eval.max_new_tokens=64 --set eval.repeats=2 --set eval.distribution_samples=0 \
    --set eval.prompt_excerpts=false --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
cp $out/eval/{result.json,report.html,summary.md} experiments/other_arms/
