#!/usr/bin/env bash
# Same rows, same target, same features, as large a head, as many minutes: what do the heads of specdec and of
# speculators 0.9.0 accept, and how fast does each train? Its own environment, two recipes for the rival, training in
# turns of 20 seconds, then one server a head and one measurement of all.
# Scaled down for two cores: minutes instead of GPU hours, a target of 135M, 1,500 short rows (its window
# of 2,048 tokens never closes). Foreseen: 75 minutes; resumes by stage (a training that was stopped starts again).
#   experiments/vs_speculators/run.sh [MINUTES_PER_SIDE [ROWS_DIR [PROMPTS [TOKENS]]]]        (default: 7, own, 960, 96)
set -euo pipefail
cd "$(dirname "$0")/../.."
minutes=${1:-7}
rows=${2:-}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python=.venv/bin/python
[ -x "$python" ] || python=python3
here=experiments/vs_speculators
work=runs/vs_speculators/$minutes-minutes
venv=runs/vs_speculators/venv

if ! cmp -s "$here/requirements.txt" "$venv/.installed"; then
    echo "making $venv with the rival's packages, once (a few minutes)" >&2
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt" ||
        { echo "if pip cannot find torch: name PyTorch's CPU wheel index in PIP_EXTRA_INDEX_URL" >&2; exit 1; }
    cp "$here/requirements.txt" "$venv/.installed"
fi

if [ -z "$rows" ]; then # the demo's rows, but more of them
    rows=runs/vs_speculators/rows
    "$python" -m specdec prepare --target smollm2-135m --out "$rows" --set traces.num_prompts=1500 \
        --set traces.max_new_tokens=128 --set traces.temperature=0 --set traces.val_fraction=0.04
fi
"$python" "$here/train.py" "$rows" "$minutes" "$work"
arms=()
for name in specdec speculators_default speculators_tuned; do
    arms+=(--arm "$name=head=$work/$name/head")
done
# Fresh tasks of the kinds that the rows are made of: no side has seen them, or chosen its checkpoint by them.
"$python" -m specdec eval --out "$work/eval" --suite reasoning-gym "${arms[@]}" \
    --set eval.num_prompts="${3:-960}" --set eval.max_new_tokens="${4:-96}" --set eval.repeats=1 \
    --set eval.sampled=false --set eval.distribution_samples=0 \
    --set 'eval.concurrency=[4]' --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
"$python" "$here/verdict.py" "$work"
