"""Times of decode steps before the first request comes: the policy's trials, on tokens that nobody waits for.

At each batch size the policy tries what it has no time of. Here it does so at start-up, on made-up requests: some
rounds over all sizes that no server before it timed twice (``serving.kept_times``), each with a turn of every K, so
that a moment when the machine is slow meets no K alone, and a machine on which ``LONGEST_SEC`` are too short for all
rounds has timed most sizes in the first. Others are tried when they first occur, by their plain and widest steps alone.
What the policy learns of time stays, but for its level, which the first served steps set: made-up ones are shorter,
those of all K much alike. What was accepted says nothing, and is forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from serving.control import CALIBRATION
from serving.engine_status import EngineStatus, EngineUnavailableError
from serving.policy import AUTO
from serving.policy_settings import ASYNCHRONOUS, PolicySettings

logger = logging.getLogger("vllm.specdec")

LONGEST_SEC = 20.0
ROUNDS = 3
PROMPT_IDS = [1, 2, 3, 4, 5, 6, 7, 8]  # of any vocabulary


async def calibrate(engine_client: Any, status: EngineStatus) -> None:
    """Let a policy that chooses time its steps. Trouble costs a line in the log: the policy learns later, then."""
    try:
        now = await status.status()
        sizes = sorted(_batch_sizes(engine_client.vllm_config).difference(now.get("timed_batch_sizes") or ()))
        if now.get("policy") != AUTO or not sizes:
            return
        begun_sec = time.monotonic()
        num_sizes = await _run_sizes(engine_client, sizes)
        await status.calibrated()
        logger.info("specdec: timed %d batch sizes in %.1f s", num_sizes, time.monotonic() - begun_sec)
    except (EngineUnavailableError, ValueError, RuntimeError) as error:
        logger.warning("specdec: steps are timed later, as they come: %s", error)


def _batch_sizes(config: Any) -> set[int]:
    """Powers of two up to what the server runs at once."""
    most = config.scheduler_config.max_num_seqs
    return {2**i for i in range(most.bit_length())}


async def _run_sizes(engine_client: Any, sizes: list[int]) -> int:
    """Returns how many batch sizes were timed."""
    from vllm import SamplingParams

    num_tokens = _tokens_of_turns(engine_client.vllm_config)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    done = 0
    try:
        async with asyncio.timeout(LONGEST_SEC):
            for turn in range(ROUNDS * len(sizes)):
                size = sizes[turn % len(sizes)]
                await asyncio.gather(*(_run(engine_client, sampling, f"{CALIBRATION}-{turn}-{i}") for i in range(size)))
                done = turn + 1
    except TimeoutError:
        logger.info("specdec: %.0f s are over after %.1f rounds of batch sizes", LONGEST_SEC, done / len(sizes))
    return min(done, len(sizes))


def _tokens_of_turns(config: Any) -> int:
    """Of an answer: a step more than every K's turn, for no draft of what is made up is accepted, or few are."""
    steps = (ASYNCHRONOUS if config.scheduler_config.async_scheduling else PolicySettings()).trial_steps
    most = config.model_config.max_model_len - len(PROMPT_IDS)
    return min((steps + 1) * (config.num_speculative_tokens + 1), most)


async def _run(engine_client: Any, sampling: Any, request_id: str) -> None:
    async for _ in engine_client.generate({"prompt_token_ids": PROMPT_IDS}, sampling, request_id):
        pass
