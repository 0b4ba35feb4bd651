"""Training at the true shape of an R1-Distill target, with random weights: tokens a second, memory, share of the peak.

    python experiments/r1_shape/run.py [--shape qwen-1.5b] [--optimizer muon] [--tokens 4096,16384] [--out FILE]

Every head at every batch size, its target features kept on the device: what one optimizer step takes. And what the
target's features cost, which training pays once a row. Rows hold random ids, as long as reasoning traces are
(log-normal); nothing is learnt here. The peak is this device's best large matrix product in the run's dtype, measured
in turn with the work; flops are counted by torch. The heads draft 32,000 tokens, EAGLE-1 the whole vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from draft_training.distributed import Processes
from draft_training.features import FeatureStore
from draft_training.heads import list_heads, load_head
from draft_training.recipe import KNOWN
from draft_training.target_model import TargetModel
from draft_training.trainer import Trainer
from specdec.config import TrainConfig, from_dict
from specdec.device import Device, detect_device
from specdec.record import provenance, write_json_atomic
from specdec.traces import TokenRow

NUM_DRAFTED, NUM_STEPS, ROUNDS = 32_000, 2, 3
SHAPES: dict[str, dict[str, Any]] = {
    "qwen-1.5b": {
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936, "rope_theta": 10_000.0,
    },
    "qwen-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064, "rope_theta": 10_000.0,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0,
    },
}  # fmt: skip
MEDIAN_TOKENS, SPREAD, LONGEST = 3_000, 0.7, 16_384


def random_target(shape: str, num_layers: int | None, device: Device) -> TargetModel:
    """The shape's model in the device's dtype, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    if num_layers is not None:
        settings["num_hidden_layers"] = num_layers
    config = AutoConfig.for_model(
        settings.pop("model_type"), tie_word_embeddings=False, max_position_embeddings=131_072, **settings
    )
    torch.manual_seed(0)
    with torch.device(device.kind):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, device.dtype), attn_implementation="sdpa")
    return TargetModel.of(model)


def random_rows(num_rows: int, longest: int, vocab_size: int) -> list[TokenRow]:
    rng, rows = random.Random(0), []
    for i in range(num_rows):
        num_tokens = min(longest, max(128, round(rng.lognormvariate(0, SPREAD) * min(MEDIAN_TOKENS, longest / 2))))
        prompt, think = num_tokens // 16, num_tokens * 7 // 8
        rows.append(
            TokenRow(
                conversation_id=str(i), prompt="", input_ids=[rng.randrange(vocab_size) for _ in range(num_tokens)],
                prompt_span=(0, prompt), think_span=(prompt, think), answer_span=(think, num_tokens),
                loss_mask=[0] * prompt + [1] * (num_tokens - prompt),
            )
        )  # fmt: skip
    return rows


def wait(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: Device) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def attention_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Of [B, N, Q, D] and [B, M, T, D] shapes, no causal half left out; torch's own formula wants N = M."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def flops_of(work: Callable[[], Any]) -> float:
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    operators = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}", None) for kind in kinds]
    formulas = {operator: attention_flops for operator in operators if operator is not None}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return float(counter.get_total_flops())


def peak_flops_per_sec(device: Device) -> float:
    """Best of ten products of square matrices."""
    width = 8192 if device.kind == "cuda" else 1024
    dtype = getattr(torch, device.dtype)
    a, b = (torch.randn(width, width, dtype=dtype, device=device.kind) for _ in range(2))
    return max(2 * width**3 / seconds_of(lambda: a @ b, device) for _ in range(10))


def peak_memory_gib(device: Device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.kind == "cuda" else None


def free(device: Device) -> None:
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(work: Callable[[], Any], num_tokens: int, device: Device) -> dict[str, Any]:
    """Medians of ``ROUNDS`` rounds; the first call, which warms up, also counts the flops."""
    flops = flops_of(work)
    rounds = []
    for _ in range(ROUNDS):
        peak = peak_flops_per_sec(device)
        seconds = seconds_of(work, device)
        rounds.append((num_tokens / seconds, flops / seconds / peak, peak))
    speeds, shares, peaks = ([each[i] for each in rounds] for i in range(3))
    return {
        "tok_per_sec": statistics.median(speeds), "tok_per_sec_range": [min(speeds), max(speeds)],
        "share_of_peak": statistics.median(shares), "peak_tflops": statistics.median(peaks) / 1e12,
        "peak_memory_gib": peak_memory_gib(device), "num_tokens": num_tokens,
    }  # fmt: skip


def features_point(target: TargetModel, rows: list[TokenRow], batch_tokens: int, device: Device) -> dict[str, Any]:
    """The target's forward over rows, three taps, packed as ``FeatureStore.fill`` packs them."""
    taps = load_head("eagle3").aux_layer_ids(load_head("eagle3").options_cls(), target.config.num_hidden_layers)
    free(device)

    def work() -> None:
        FeatureStore(target, rows, taps, 2**62).fill(batch_tokens, "features")

    return measured(work, sum(len(row.input_ids) for row in rows), device)


def training_point(
    name: str, target: TargetModel, rows: list[TokenRow], batch_tokens: int, optimizer: str, device: Device
) -> dict[str, Any]:
    """``NUM_STEPS`` optimizer steps of one head with the default recipe but for the optimizer, at this batch size."""
    spec = load_head(name)
    asked = {"draft_vocab_size": NUM_DRAFTED} if hasattr(spec.options_cls, "draft_vocab_size") else {}
    options = from_dict(spec.options_cls, asked)
    num_drafted = options.resolve_draft_vocab_size(target.config.vocab_size, Counter())
    free(device)
    torch.manual_seed(0)
    head = spec.build(target, torch.arange(num_drafted), options, 3).to(device.kind)
    store = FeatureStore(target, rows, head.aux_layer_ids, 2**62)
    config = TrainConfig(batch_tokens=batch_tokens, epochs=1, optimizer=optimizer)
    trainer = Trainer(
        head=head, train_store=store, val_store=store, config=config, on_policy=True, work_dir=Path(), identity={},
        precision="bf16" if device.native_bf16 else "fp32", processes=Processes("ddp", device),
    )  # fmt: skip
    whole = sorted(trainer.batches, key=lambda batch: -sum(window.num_tokens for window in batch))[:NUM_STEPS]
    store.features([window for batch in whole for window in batch])

    def work() -> None:
        for batch in whole:
            trainer._train_step(batch)

    point = measured(work, sum(window.num_tokens for batch in whole for window in batch), device)
    point["num_parameters"] = sum(p.numel() for p in head.parameters() if p.requires_grad)
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen-1.5b")
    parser.add_argument("--layers", type=int, help="of the target; default: all (fewer for a try on a CPU)")
    parser.add_argument("--tokens", default="4096,16384", help="batch sizes")
    parser.add_argument("--optimizer", choices=KNOWN["optimizer"], default="auto")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    args = parser.parse_args()
    device = detect_device()
    target = random_target(args.shape, args.layers, device)
    rows = random_rows(args.rows, args.longest, target.config.vocab_size)
    result: dict[str, Any] = {"features": {}, "training": {}}
    accelerator = torch.cuda.get_device_name() if device.kind == "cuda" else None
    for batch_tokens in map(int, args.tokens.split(",")):
        result["features"][batch_tokens] = features_point(target, rows, batch_tokens, device)
        print(batch_tokens, "features", json.dumps(result["features"][batch_tokens]), file=sys.stderr, flush=True)
        for name in list_heads():
            point: dict[str, Any] = {"error": "out of memory"}
            with suppress(torch.OutOfMemoryError):
                point = training_point(name, target, rows, batch_tokens, args.optimizer, device)
            result["training"].setdefault(name, {})[batch_tokens] = point
            print(batch_tokens, name, json.dumps(point), file=sys.stderr, flush=True)
            facts = provenance(shape=args.shape, settings=sys.argv[1:], accelerator=accelerator)
            write_json_atomic(args.out, {**result, "provenance": facts})


if __name__ == "__main__":
    main()
