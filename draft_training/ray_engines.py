"""On-policy completions past one machine: vLLM engines as actors of a Ray cluster, fed by Ray Data."""

from __future__ import annotations

import logging
import os

from draft_training.completions import CompletionLog, Requests
from draft_training.generate import engine_settings, sampling_settings
from specdec.config import TracesConfig
from specdec.device import Device, detect_device, vllm_environment
from specdec.targets import Target

# A block is what Ray hands out, hands back and repeats when an engine dies: one prompt where their number allows it.
MAX_BLOCKS = 10_000


def generate_with_ray(target: Target, dtype: str, traces: TracesConfig, requests: Requests, log: CompletionLog) -> None:
    """Answer ``requests`` on ``traces.ray_engines`` engines of the cluster; this process alone writes ``log``.

    The cluster is the one of ``RAY_ADDRESS``, else one that runs on this machine, else a new one of this machine alone.
    Each engine has one GPU, or one CPU of a cluster without GPUs. The target is read by the same path on every node.
    Sampling is seeded by prompt, as in one process.

    Raises:
        ValueError: Ray is not installed, the cluster is too small, or the engines fail.
    """
    try:
        import ray
        from ray.data import DataContext, from_items
        from ray.data.llm import build_processor, vLLMEngineProcessorConfig
        from ray.exceptions import RayError
    except ImportError as error:
        raise ValueError(f"traces.ray_engines needs Ray Data ({error}): pip install 'specdec[ray]'") from error

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)  # our stdout is data
    device, environment = _device_of(ray.cluster_resources(), traces.ray_engines)
    DataContext.get_current().enable_progress_bars = False  # the log has its own
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(target.path),
            engine_kwargs=engine_settings(target, dtype, device, traces, max(map(len, requests.values()))),
            runtime_env={"env_vars": environment},
            placement_group_config={"bundles": [{"CPU": 1} if device.kind == "cpu" else {"CPU": 1, "GPU": 1}]},
            concurrency=(traces.ray_engines, traces.ray_engines),
            batch_size=1,
            max_concurrent_batches=traces.max_num_seqs,
            log_engine_metrics=False,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        postprocess=lambda row: {"number": row["number"], "completion_ids": row["generated_tokens"]},
        # On a cluster of CPUs the engines may hold all of them.
        preprocess_map_kwargs={"num_cpus": 0},
        postprocess_map_kwargs={"num_cpus": 0},
    )
    prompts = list(requests)
    rows = [
        {
            "number": number,
            "tokenized_prompt": requests[prompt],
            "sampling_params": sampling_settings(target, traces, prompt),
        }
        for number, prompt in enumerate(prompts)
    ]
    try:
        answers = processor(from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)))
        with log.writing(len(rows)) as writer:
            for answer in answers.iter_rows():
                prompt = prompts[answer["number"]]
                writer.add(prompt, requests[prompt], [int(token) for token in answer["completion_ids"]], None)
    except RayError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise ValueError(
            f"the engines on Ray failed: {last_line}; what is answered is kept: mend it and run the same command again"
        ) from error


def _device_of(resources: dict[str, float], num_engines: int) -> tuple[Device, dict[str, str]]:
    """The device that engines of a cluster with these resources run on, and their environment."""
    here = detect_device()
    num_gpus = int(resources.get("GPU", 0))
    unit, num_units = ("GPUs", num_gpus) if num_gpus else ("CPUs", int(resources.get("CPU", 0)))
    if num_engines > num_units:
        raise ValueError(f"traces.ray_engines={num_engines}, but the Ray cluster has {num_units} {unit}")
    kind = "cuda" if num_gpus else "cpu"
    device = Device(kind=kind, core_ids=here.core_ids, native_bf16=here.native_bf16 or num_gpus > 0)
    return device, {"VLLM_LOGGING_LEVEL": "ERROR", **vllm_environment(device, existing=os.environ)}
