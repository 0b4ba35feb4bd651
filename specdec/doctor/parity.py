"""Does the served head accept what training's own walk does? The one check that needs a server."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from specdec.config import RunConfig
from specdec.doctor.findings import Finding
from specdec.manifest import HeadManifest
from specdec.metrics import AcceptanceCounts

MAX_DIFFERENCE = 0.03  # of the served acceptance length
DEFAULT_SUITE = "reasoning-gym"

# Of a head, on answers as token ids of (prompt, answer).
Measure = Callable[[RunConfig, Path, list[tuple[list[int], list[int]]]], AcceptanceCounts]


def check_parity(config: RunConfig, head_dir: Path, prompts: Path | None, measure: Measure) -> list[Finding]:
    """Serve the head on vLLM, greedily, and ``measure`` it on the very answers that come back.

    Raises:
        ValueError: a head that ``specdec train`` did not make, or one that can't be served.
    """
    from specdec.evaluation.answers import NAME, read_answers
    from specdec.evaluation.arm_specs import SPEC
    from specdec.evaluation.run import evaluate

    if "config" not in HeadManifest.load(head_dir).provenance:
        raise ValueError(f"--parity compares with training; {head_dir} was not made by `specdec train`: leave it out")
    asked = dataclasses.replace(
        config.eval, suites=[str(prompts) if prompts else DEFAULT_SUITE], arms=[], repeats=1, greedy=True,
        sampled=False, distribution_samples=0, prompt_excerpts=True,
    )  # fmt: skip
    at_trained_k = dataclasses.replace(config.serve, num_speculative_tokens=None)
    with tempfile.TemporaryDirectory(prefix="specdec-parity-") as folder:
        result = evaluate(dataclasses.replace(config, eval=asked, serve=at_trained_k), head_dir, Path(folder))
        answers = [each for each in read_answers(Path(folder) / NAME) if each.arm == SPEC and each.token_ids]
    served = result["summary"]["acceptance_length"]
    trained = measure(config, head_dir, [(each.prompt_token_ids, each.token_ids) for each in answers]).acceptance_length
    if served is None or trained is None:
        raise ValueError(f"nothing to compare: {'; '.join(result['notes']) or 'the server drafted nothing'}")
    if abs(served - trained) <= MAX_DIFFERENCE * served:
        return []
    what = f"served, the acceptance length is {served:.3f}; training's walk over the same answers gives {trained:.3f}"
    return [
        Finding(code="parity", what=what, fix="the server computes another head than training did: export it again")
    ]
