"""Faults for the instrument to find, planted in vLLM's scheduler (``--scheduler-cls experiments.planted.plant.NAME``).

slow      each engine step takes 10 % longer
drafts    every twentieth draft's first token is replaced: 5 % of the drafts are lost, outputs stay the same
sampler   at temperature > 0 a quarter of the rejected first draft tokens is put out all the same: a lenient verifier
"""

from __future__ import annotations

import random
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

SLOWDOWN = 0.10
LOST_DRAFTS = 0.05
LENIENCY = 0.25
LONGEST_STEP_SEC = 1.0  # a longer pause is an idle server


class SlowScheduler(Scheduler):
    """Sleeps a share of the time since the last step."""

    _step_ended = 0.0

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        step_sec = time.perf_counter() - self._step_ended
        if step_sec < LONGEST_STEP_SEC:
            time.sleep(SLOWDOWN * step_sec)
        self._step_ended = time.perf_counter()
        return outputs


class LostDraftsScheduler(Scheduler):
    """Spoils drafts; verification then rejects them."""

    _random = random.Random(0)

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None and request.spec_token_ids and self._random.random() < LOST_DRAFTS:
                first, *rest = request.spec_token_ids
                request.spec_token_ids = [first + 1 if first == 0 else first - 1, *rest]


class LenientScheduler(Scheduler):
    """Puts out draft tokens that the rejection sampler had rejected."""

    _random = random.Random(0)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for request_id, index in model_runner_output.req_id_to_index.items():
            tokens = model_runner_output.sampled_token_ids[index]
            request, draft = self.requests.get(request_id), drafts.get(request_id)
            if request is None or not draft or not len(tokens) or request.sampling_params.temperature == 0:
                continue
            if tokens[0] != draft[0] and self._random.random() < LENIENCY:
                tokens[0] = draft[0]
        return super().update_from_output(scheduler_output, model_runner_output)


slow, drafts, sampler = SlowScheduler, LostDraftsScheduler, LenientScheduler
