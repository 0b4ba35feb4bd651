"""What the control costs the engine's process: microseconds of CPU a step at 256 requests, median of rounds."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

from serving.control import Control
from serving.monitor import Monitor, SpanTracker
from serving.policy import Policy

NUM_REQUESTS, WIDTH, STEPS, ROUNDS = 256, 3, 200, 9
WORK = Path("runs/never_slower")


def step_usec(rng: random.Random) -> float:
    """Hooks of one step: schedule, a verification each request, choose, the end."""
    requests = [
        SimpleNamespace(request_id=f"r{i}", prompt_token_ids=[1] * 64, output_token_ids=[2] * rng.randrange(4096))
        for i in range(NUM_REQUESTS)
    ]
    rates = [0.6, 0.7, 0.6]
    control = Control(Policy(WIDTH, rates), Monitor(WIDTH, rates), SpanTracker([7], [8]), rates)
    names = [request.request_id for request in requests]
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [5] * WIDTH for name in names},
        num_scheduled_tokens=dict.fromkeys(names, 1 + WIDTH),
        scheduled_new_reqs=[],
        num_spec_tokens_to_schedule=WIDTH,
    )
    accepted = [rng.randrange(WIDTH + 1) for _ in range(NUM_REQUESTS)]
    begun = time.thread_time()
    for _ in range(STEPS):
        control.choose(NUM_REQUESTS, names)
        control.scheduled(output)
        for request, count in zip(requests, accepted, strict=True):
            control.drafted(request, WIDTH, count)
        control.ended(2 * NUM_REQUESTS, lambda name: True)
    return (time.thread_time() - begun) / STEPS * 1e6


def main() -> None:
    rng = random.Random(0)
    rounds = sorted(step_usec(rng) for _ in range(ROUNDS))
    figures = {
        "policy_overhead_usec": statistics.median(rounds),
        "policy_overhead_usec_range": [rounds[0], rounds[-1]],
        "policy_overhead_num_requests": NUM_REQUESTS,
    }
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "overhead.json").write_text(json.dumps(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
