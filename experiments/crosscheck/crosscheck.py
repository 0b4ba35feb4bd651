"""The same server measured by three clients in turn: ``specdec eval``, ``vllm bench serve`` and guidellm.

One round is one pass of each client over the same prompts, greedy, so many requests at a time, each round in another
order. One at a time, specdec's pass is broken into as many turns as there are prompts; four at a time it is as unbroken
as the others'.
A ratio is the median over rounds of the two clients' figures of one round, with the lowest and the highest beside it.
Acceptance, at a fixed K, must be equal: drafts and accepted tokens as the requests count them, as the server's
Prometheus counters do around the blocks, and as vLLM's benchmark reads them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from specdec.config import RunConfig
from specdec.evaluation.arm_specs import ArmSpec
from specdec.evaluation.arms import open_arms
from specdec.evaluation.suites import load_suite
from specdec.manifest import HeadManifest
from specdec.progress import progress_bar
from specdec.record import provenance, write_json_atomic
from specdec.targets import resolve_target

OUT = Path(__file__).with_name("result.json")
WORK = Path("runs/crosscheck")
ROUNDS = WORK / "rounds.json"
NUM_TOKENS = 64
# `vllm bench serve` without vLLM's command line, which does not know the CPU build's package name.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
FIGURES = ("ttft_sec", "tpot_sec", "throughput_tok_per_sec")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def by_specdec(url: str, concurrency: int, prompts: Path, target: str, label: str) -> dict[str, float]:
    """An A/A run: both arms are the server, so its figures pool two passes."""
    out = WORK / f"specdec-{label}"
    shutil.rmtree(out, ignore_errors=True)  # a pass that was broken off is made again
    settings = (
        f"eval.max_new_tokens={NUM_TOKENS}", "eval.repeats=1", "eval.sampled=false", "eval.num_prompts=1000",
        "eval.distribution_samples=0", f"eval.concurrency=[{concurrency}]",
    )  # fmt: skip
    command = [sys.executable, "-m", "specdec", "eval", "--target", target, "--prompts", str(prompts)]
    command += ["--out", str(out), "--arm", f"a={url}", "--arm", f"b={url}"]
    run([*command, *(f"--set={item}" for item in settings)])
    result = json.loads((out / "result.json").read_text())
    arms = result["cells"][0]["arms"]
    rows = [row for row in result["requests"] if not row["error"]]
    once = [row for row in rows if row["arm"] == "a"]
    return {
        "ttft_sec": statistics.fmean(row["ttft_sec"] for row in rows),
        "tpot_sec": statistics.fmean(row["tpot_sec"] for row in rows),
        "throughput_tok_per_sec": sum(arm["num_output_tokens"] for arm in arms.values())
        / sum(arm["busy_sec"] for arm in arms.values()),
        "num_drafts": sum(row["num_drafts"] for row in once),
        "num_accepted_tokens": sum(row["num_accepted_tokens"] for row in once),
        "prometheus_num_drafts": arms["a"]["acceptance"]["num_drafts"],
        "prometheus_num_accepted_tokens": arms["a"]["acceptance"]["num_accepted_tokens"],
    }


def by_vllm_bench(url: str, concurrency: int, prompts: Path, target: str, label: str) -> dict[str, float]:
    count = len(prompts.read_text().splitlines())
    name = f"vllm-{label}.json"
    model = str(resolve_target(RunConfig().target).path) if target == RunConfig().target.name else target
    command = [sys.executable, "-c", VLLM_BENCH, "--backend", "openai-chat"]
    command += ["--base-url", url, "--endpoint", "/v1/chat/completions", "--model", target, "--tokenizer", model]
    command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--num-prompts", str(count)]
    command += ["--custom-output-len", str(NUM_TOKENS), "--max-concurrency", str(concurrency), "--temperature", "0"]
    command += ["--skip-chat-template", "--disable-shuffle", "--save-result", "--result-dir", str(WORK)]
    run([*command, "--result-filename", name])
    found = json.loads((WORK / name).read_text())
    return {
        "ttft_sec": found["mean_ttft_ms"] / 1e3,
        "tpot_sec": found["mean_tpot_ms"] / 1e3,
        "throughput_tok_per_sec": found["output_throughput"],
        "num_drafts": found["spec_decode_num_drafts"],
        "num_accepted_tokens": found["spec_decode_accepted_tokens"],
    }


def by_guidellm(guidellm: str, url: str, concurrency: int, prompts: Path, target: str, label: str) -> dict[str, float]:
    count = len(prompts.read_text().splitlines())
    out = WORK / f"guidellm-{label}.json"
    model = str(resolve_target(RunConfig().target).path) if target == RunConfig().target.name else target
    backend = {
        "kind": "openai_http", "target": url, "model": target, "request_format": "/v1/chat/completions",
        "extras": {"body": {"max_tokens": NUM_TOKENS, "temperature": 0}},
    }  # fmt: skip
    command = [guidellm, "run", "--backend", json.dumps(backend), "--profile", f"kind=concurrent,streams={concurrency}"]
    command += ["--constraint", f"kind=max_requests,count={count}", "--tokenizer", f"kind=hf_auto,model={model}"]
    command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={out}"]
    run([*command, "--disable-console"])
    metrics = json.loads(out.read_text())["benchmarks"][0]["metrics"]

    def mean(name: str) -> float:
        return metrics[name]["successful"]["mean"]

    return {
        "ttft_sec": mean("time_to_first_token_ms") / 1e3,
        # guidellm's "time per output token" counts the first; its inter-token latency is (e2e - ttft) / (n - 1).
        "tpot_sec": mean("inter_token_latency_ms") / 1e3,
        "throughput_tok_per_sec": mean("output_tokens_per_second"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidellm", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--target", default=RunConfig().target.name)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=1)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    prompts = WORK / "prompts.jsonl"
    items = load_suite("reasoning-gym", options.num_prompts, seed=7).items
    prompts.write_text("".join(json.dumps({"prompt": item.turns[0]}) + "\n" for item in items))
    config = RunConfig()
    config.target.name = options.target
    config.serve.max_model_len, config.serve.max_num_seqs, config.serve.kv_cache_gib = 1024, 4, 1
    # The other clients can't keep a repeated prompt from being found in the prefix cache.
    served = {
        "head": options.head,
        "serve.policy": f"fixed:{HeadManifest.load(Path(options.head)).num_speculative_tokens}",
    }
    spec = ArmSpec(name="served", options={**served, "vllm.no-enable-prefix-caching": "true"})
    rounds = finished_rounds(vars(options))
    with open_arms([spec], config, WORK) as arms, progress_bar("crosscheck", options.rounds) as advance:
        url = arms["served"].url
        clients = {
            "specdec": partial(by_specdec, url, options.concurrency),
            "vllm_bench": partial(by_vllm_bench, url, options.concurrency),
            "guidellm": partial(by_guidellm, options.guidellm, url, options.concurrency),
        }
        clients["specdec"](prompts, options.target, "warm-up")
        advance(len(rounds))
        for number in range(len(rounds), options.rounds):
            order = list(clients)[number % 3 :] + list(clients)[: number % 3]
            rounds.append({name: clients[name](prompts, options.target, str(number)) for name in order})
            write_json_atomic(ROUNDS, {"options": vars(options), "rounds": rounds})
            advance(1, json.dumps(ratios_of(rounds)))
    facts = provenance(head=options.head, num_prompts=options.num_prompts)
    found = {"ratios": ratios_of(rounds), "acceptance": acceptance_of(rounds), "rounds": rounds, "provenance": facts}
    loads = json.loads(OUT.read_text()) if OUT.is_file() else {}
    write_json_atomic(OUT, {**loads, f"concurrency_{options.concurrency}": found})
    print(json.dumps({key: found[key] for key in ("ratios", "acceptance")}))


def finished_rounds(options: dict[str, Any]) -> list[dict[str, dict[str, float]]]:
    """Of an earlier run with these options that was broken off."""
    kept = json.loads(ROUNDS.read_text()) if ROUNDS.is_file() else {}
    return kept["rounds"] if kept.get("options") == options else []


def ratios_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """specdec's figure over the rival's: median, lowest, highest of the rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for rival in ("vllm_bench", "guidellm"):
        for name in FIGURES:
            each = [clients["specdec"][name] / clients[rival][name] for clients in rounds]
            found.setdefault(rival, {})[name] = [statistics.median(each), min(each), max(each)]
    return found


def acceptance_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Drafts and accepted tokens of one pass over the prompts, by whom they were counted; one pair where all agree."""
    counts = {
        "requests": {(each["specdec"]["num_drafts"], each["specdec"]["num_accepted_tokens"]) for each in rounds},
        "prometheus": {
            (each["specdec"]["prometheus_num_drafts"], each["specdec"]["prometheus_num_accepted_tokens"])
            for each in rounds
        },
        "vllm_bench": {
            (each["vllm_bench"]["num_drafts"], each["vllm_bench"]["num_accepted_tokens"]) for each in rounds
        },
    }
    return {"equal": len(set.union(*counts.values())) == 1, **{name: sorted(pairs) for name, pairs in counts.items()}}


if __name__ == "__main__":
    main()
