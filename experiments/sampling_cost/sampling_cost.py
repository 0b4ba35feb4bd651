"""Top-p on CPU: vLLM's own function against serving/nucleus.py, alone and in a whole offline generation.

    python experiments/sampling_cost/sampling_cost.py [ROUNDS]

Alone: on the embedded target's own logits (batches of 16 and 64 rows), both in turn, and the sort by itself. Whole: one
offline engine answers the same prompts greedily, with vLLM's top-p and with ours, in turn. Ratios are of neighbours in
time. Writes result.json beside this.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draft_training.prompts import embedded_prompts
from serving.nucleus import NUM_CANDIDATES, nucleus_edge, without_sort
from specdec.config import TargetConfig
from specdec.device import detect_device, vllm_environment
from specdec.record import provenance, write_json_atomic
from specdec.targets import resolve_target

SAMPLINGS = [(0.2, 0.9), (0.6, 0.95), (1.0, 0.95)]  # the target's own, R1-Distill's, the widest in use
NUM_PROMPTS, NUM_TOKENS = 64, 32


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed_ms(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


@torch.inference_mode()
def own_logits(path: Path, temperature: float, top_p: float) -> torch.Tensor:
    """Logits [512, vocab] at which the target chose the tokens of its own answers, over temperature."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in embedded_prompts(16, seed=0)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    answered = model.generate(
        **inputs, do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=32, min_new_tokens=32,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.cat(answered.logits).float() / temperature


def alone(theirs: Any, path: Path, rounds: int) -> list[dict[str, Any]]:
    ours, measured = without_sort(theirs), []
    for temperature, top_p in SAMPLINGS:
        pool = own_logits(path, temperature, top_p)
        for batch in (16, 64):
            p = torch.full((batch,), top_p)
            times: dict[str, list[float]] = {"theirs": [], "ours": [], "sort": [], "greedy": []}
            num_sorted = 0
            for i in range(rounds + 1):
                start = i * batch % (len(pool) - batch + 1)
                logits = pool[start : start + batch].clone()
                a, b = logits.clone(), logits.clone()
                took = {
                    "theirs": timed_ms(lambda a=a, p=p: theirs(a, None, p, allow_cpu_sync=True)),
                    "ours": timed_ms(lambda b=b, p=p: ours(b, None, p, allow_cpu_sync=True)),
                    "sort": timed_ms(lambda logits=logits: logits.sort(dim=-1)),
                    "greedy": timed_ms(lambda logits=logits: logits.argmax(dim=-1)),
                }
                assert torch.equal(a, b)
                if i:  # the first warms up
                    num_sorted += int((~nucleus_edge(logits, p)[1]).sum())
                    for name, ms in took.items():
                        times[name].append(ms)
            measured.append(
                {
                    "temperature": temperature, "top_p": top_p, "batch": batch, "vocab": pool.shape[1],
                    **{f"{name}_ms": spread(values) for name, values in times.items()},
                    "sort_share": spread([s / t for s, t in zip(times["sort"], times["theirs"], strict=True)]),
                    "ratio": spread([t / o for t, o in zip(times["theirs"], times["ours"], strict=True)]),
                    "sorted_rows_share": num_sorted / (rounds * batch),
                }
            )  # fmt: skip
            print(measured[-1], flush=True)
    return measured


def use(worker: Any, ours: bool) -> bool:
    """In the engine's worker: vLLM's function or ours; whether ours was there at first, which the plugin puts there."""
    from vllm.v1.sample.ops import topk_topp_sampler

    function = topk_topp_sampler.apply_top_k_top_p_pytorch
    theirs = getattr(function, "__wrapped__", function)
    topk_topp_sampler.apply_top_k_top_p_pytorch = without_sort(theirs) if ours else theirs
    return function is not theirs


def whole(path: Path, rounds: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(path), dtype=detect_device().dtype, max_model_len=512, max_num_seqs=NUM_PROMPTS, enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    [was_loaded] = engine.collective_rpc(use, args=(True,))
    assert was_loaded, "the plugin is not loaded in an offline engine"
    temperature, top_p = SAMPLINGS[1]
    chats = [[{"role": "user", "content": prompt}] for prompt in embedded_prompts(NUM_PROMPTS, seed=0)]
    speeds: dict[str, list[float]] = {"greedy": [], "theirs": [], "ours": []}
    for i in range(rounds + 1):
        for arm in speeds:
            engine.collective_rpc(use, args=(arm == "ours",))
            sampling = SamplingParams(
                temperature=0.0 if arm == "greedy" else temperature, top_p=1.0 if arm == "greedy" else top_p, seed=i,
                max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False,
            )  # fmt: skip
            ms = timed_ms(lambda sampling=sampling: engine.chat(chats, sampling, use_tqdm=False))
            if i:  # the first warms up
                speeds[arm].append(1000 * NUM_PROMPTS * NUM_TOKENS / ms)
    ratios = {
        "ours_over_theirs": spread([o / t for o, t in zip(speeds["ours"], speeds["theirs"], strict=True)]),
        "greedy_over_theirs": spread([g / t for g, t in zip(speeds["greedy"], speeds["theirs"], strict=True)]),
        "greedy_over_ours": spread([g / o for g, o in zip(speeds["greedy"], speeds["ours"], strict=True)]),
    }
    settings = {"batch": NUM_PROMPTS, "tokens": NUM_TOKENS, "temperature": temperature, "top_p": top_p}
    return {**settings, "tok_per_sec": {arm: spread(values) for arm, values in speeds.items()}, **ratios}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    os.environ.update(vllm_environment(detect_device(), existing=os.environ, kv_cache_gib=1))
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    target = resolve_target(TargetConfig())
    theirs = getattr(apply_top_k_top_p_pytorch, "__wrapped__", apply_top_k_top_p_pytorch)
    summary = {"alone": alone(theirs, target.path, rounds), "whole": whole(target.path, rounds)}
    print(summary["whole"])
    facts = provenance(target=target.name, candidates=NUM_CANDIDATES, threads=torch.get_num_threads(), rounds=rounds)
    write_json_atomic(Path(__file__).with_name("result.json"), {"summary": summary, "provenance": facts})


if __name__ == "__main__":
    main()
