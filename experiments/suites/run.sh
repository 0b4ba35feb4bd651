#!/usr/bin/env bash
# One report over GSM8K, MATH-500, HumanEval, MT-bench and Spec-Bench prompts: plain, the head, and n-gram lookup.
# Needs the benchmarks' files (SPECDEC_DATA_DIR, or --suite NAME=FILE); about 20 minutes on 2 cores, resumable.
# Scaled down: 8 prompts of each and 64 tokens an answer; with them accuracies are a check of the way, no claim.
#   experiments/suites/run.sh [HEAD_DIR [PROMPTS_PER_SUITE [TOKENS]]]      (default: the demo's head, 8, 64)
set -euo pipefail
cd "$(dirname "$0")/../.."
head=${1:-runs/demo/head}
python=.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -m specdec eval --out runs/suites --arm plain=plain --arm eagle3=head="$head" --arm ngram=method=ngram,k=3 \
    --suite gsm8k --suite math500 --suite humaneval --suite mt_bench --suite spec_bench \
    --set eval.num_prompts="${2:-8}" --set eval.max_new_tokens="${3:-64}" \
    --set eval.repeats=2 --set eval.distribution_samples=0 --set eval.sampled=false --set eval.prompt_excerpts=false --price-per-hour 0.10 \
    --set serve.max_model_len=2048 --set serve.max_num_seqs=4 --set serve.kv_cache_gib=1
cp runs/suites/{result.json,report.html,summary.md} experiments/suites/
