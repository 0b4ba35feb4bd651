"""On-policy completions through vLLM's offline engine, in this process."""

from __future__ import annotations

import os
from typing import Any

from draft_training.completions import CompletionLog, Requests, sampling_of
from specdec.config import TracesConfig
from specdec.device import Device, vllm_environment
from specdec.record import text_sha256
from specdec.targets import Target


def generate_offline(
    target: Target, dtype: str, device: Device, traces: TracesConfig, requests: Requests, log: CompletionLog
) -> None:
    """Answer ``requests`` in an engine of this process; every finished one is in ``log`` at once."""
    os.environ.update(vllm_environment(device, existing=os.environ))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # our stdout is data
    from vllm import SamplingParams

    engine = _start_engine(target, dtype, device, traces, max(map(len, requests.values())))
    prompts = list(requests)
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(**sampling_settings(target, traces, prompt))
        engine.add_request(str(index), {"prompt_token_ids": requests[prompt]}, sampling)
    with log.writing(len(requests)) as writer:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    prompt, completion = prompts[int(output.request_id)], output.outputs[0]
                    writer.add(prompt, requests[prompt], list(completion.token_ids), completion.finish_reason)
    engine.engine_core.shutdown()


def _start_engine(target: Target, dtype: str, device: Device, traces: TracesConfig, longest_prompt: int) -> Any:
    from vllm import EngineArgs, LLMEngine

    settings = engine_settings(target, dtype, device, traces, longest_prompt)
    return LLMEngine.from_engine_args(EngineArgs(model=str(target.path), **settings))


def engine_settings(
    target: Target, dtype: str, device: Device, traces: TracesConfig, longest_prompt: int
) -> dict[str, Any]:
    """vLLM's engine arguments, without the model; ``dtype`` may be auto."""
    max_model_len = min(target.max_position_embeddings, longest_prompt + traces.max_new_tokens)
    return {
        "dtype": device.settled(dtype),
        "max_model_len": max_model_len,
        "max_num_seqs": traces.max_num_seqs,
        # Whole prompts only: a seeded request whose prompt is prefilled in chunks kills vLLM 0.32's CPU engine.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 2048),
        # Batches of dozens are bound by matrix products, where compiling gains little and takes minutes.
        "enforce_eager": device.kind == "cpu",
        "disable_log_stats": True,
        "seed": traces.seed,
    }


def sampling_settings(target: Target, traces: TracesConfig, prompt: str) -> dict[str, Any]:
    """vLLM's sampling parameters of one prompt."""
    temperature, top_p = sampling_of(target, traces)
    return {
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": traces.max_new_tokens,
        "seed": int(text_sha256(str(traces.seed), prompt)[:8], 16) if temperature else None,  # the same after a resume
        "detokenize": False,
    }
