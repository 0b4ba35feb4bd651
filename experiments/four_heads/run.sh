#!/usr/bin/env bash
# Four architectures on the same rows, then one measurement: plain decode and the four heads, interleaved.
# Scaled down for two cores: 240 rows, five epochs, 60 held-out prompts. Training resumes and is skipped where it is
# complete; about half an hour.
#   experiments/four_heads/run.sh [ROWS_DIR [PROMPTS [TOKENS]]]                          (default: own, 60, 128)
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
rows=${1:-}
python=.venv/bin/python
[ -x "$python" ] || python=python3
if [ -z "$rows" ]; then # the demo's, with more of them held out: each prompt's chance falls on both sides of a comparison
    rows=runs/four_heads/rows
    "$python" -m specdec prepare --target smollm2-135m --out "$rows" --set traces.num_prompts=300 \
        --set traces.max_new_tokens=128 --set traces.temperature=0 --set traces.val_fraction=0.2
fi
arms=(--arm plain=plain)
for head in medusa eagle peagle eagle3; do
    options=(--set train.epochs=5 --set train.num_evals=3)
    # eagle drafts the target's whole vocabulary; the others its most frequent tokens.
    [ "$head" = eagle ] || options+=(--set head.options.draft_vocab_size=2048)
    "$python" -m specdec train --traces "$rows" --head "$head" --out "runs/four_heads/$head" "${options[@]}"
    arms+=(--arm "$head=head=runs/four_heads/$head")
done
"$python" -m specdec eval --out runs/four_heads/eval --prompts "$rows/val_prompts.jsonl" "${arms[@]}" \
    --set eval.num_prompts="${2:-60}" --set eval.max_new_tokens="${3:-128}" --set eval.repeats=1 \
    --set eval.sampled=false --set eval.distribution_samples=0 \
    --set serve.max_model_len=1024 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
"$python" experiments/four_heads/verdict.py runs/four_heads/eval "$rows/val_prompts.jsonl"
