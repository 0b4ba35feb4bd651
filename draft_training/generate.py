"""On-policy completions: the target answers prompts through vLLM's offline engine, resumable line by line."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from specdec.config import TracesConfig
from specdec.device import Device, vllm_environment
from specdec.progress import progress_bar
from specdec.record import text_sha256
from specdec.targets import Target

logger = logging.getLogger(__name__)


def load_completions(path: Path) -> dict[str, dict[str, Any]]:
    """Finished completions by conversation id. A torn last line, left by a kill, is cut off the file."""
    finished: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return finished
    intact_bytes = 0
    with path.open("rb") as file:
        for line in file:
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                break
            finished[item["conversation_id"]] = item
            intact_bytes += len(line)
    if intact_bytes < path.stat().st_size:
        os.truncate(path, intact_bytes)
    return finished


def generate_completions(
    target: Target, dtype: str, device: Device, traces: TracesConfig, requests: dict[str, list[int]], path: Path
) -> dict[str, dict[str, Any]]:
    """Answer ``requests`` (prompt -> prompt ids); every finished one is a line of ``path`` at once.

    Returns all finished completions, earlier runs' included, by conversation id. Each line holds
    ``conversation_id, prompt, prompt_ids, completion_ids, finish_reason``.
    """
    finished = load_completions(path)
    todo = {prompt: ids for prompt, ids in requests.items() if text_sha256(prompt) not in finished}
    if not todo:
        return finished
    if len(todo) < len(requests):
        logger.info("resuming: %d of %d completions are there", len(requests) - len(todo), len(requests))
    os.environ.update(vllm_environment(device, existing=os.environ))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # our stdout is data
    engine = _start_engine(target, dtype, device, traces, max(map(len, todo.values())))
    prompts = list(todo)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": todo[prompt]}, _sampling(target, traces, prompt))
    num_tokens, started = 0, time.monotonic()
    with path.open("a", encoding="utf-8") as file, progress_bar("generating", len(todo)) as advance:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                prompt, completion = prompts[int(output.request_id)], output.outputs[0]
                item = {
                    "conversation_id": text_sha256(prompt),
                    "prompt": prompt,
                    "prompt_ids": todo[prompt],
                    "completion_ids": list(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }
                file.write(json.dumps(item) + "\n")
                file.flush()
                finished[item["conversation_id"]] = item
                num_tokens += len(completion.token_ids)
                advance(1, f"{num_tokens / (time.monotonic() - started):.0f} tok/s")
    engine.engine_core.shutdown()
    return finished


def _start_engine(target: Target, dtype: str, device: Device, traces: TracesConfig, longest_prompt: int) -> Any:
    from vllm import EngineArgs, LLMEngine

    max_model_len = min(target.max_position_embeddings, longest_prompt + traces.max_new_tokens)
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=str(target.path),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=traces.max_num_seqs,
            # Whole prompts only: a seeded request whose prompt is prefilled in chunks kills vLLM 0.32's CPU engine.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(max_model_len, 2048),
            # Batches of dozens are bound by matrix products, where compiling gains little and takes minutes.
            enforce_eager=device.kind == "cpu",
            disable_log_stats=True,
            seed=traces.seed,
        )
    )


def _sampling(target: Target, traces: TracesConfig, prompt: str) -> Any:
    from vllm import SamplingParams

    temperature = target.sampling.get("temperature", 1.0) if traces.temperature is None else traces.temperature
    top_p = target.sampling.get("top_p", 1.0) if traces.top_p is None else traces.top_p
    greedy = temperature == 0
    return SamplingParams(
        temperature=temperature,
        top_p=1.0 if greedy else top_p,
        max_tokens=traces.max_new_tokens,
        seed=None if greedy else int(text_sha256(str(traces.seed), prompt)[:8], 16),  # the same after a resume
        detokenize=False,
    )
