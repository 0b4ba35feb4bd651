"""Does the served head accept what training said it would? The one check that needs a server."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from specdec.config import RunConfig
from specdec.doctor.findings import Finding

MAX_DIFFERENCE = 0.05  # of the served acceptance length


def check_parity(config: RunConfig, head_dir: Path, prompts: Path | None) -> list[Finding]:
    """Serve the head on vLLM, decode its held-out prompts greedily, and compare the acceptance lengths.

    Raises:
        ValueError: no prompts, or none that training measured; or the head can't be served.
    """
    from specdec.evaluation.run import evaluate

    if prompts is None:
        raise ValueError("--parity needs the prompts that training held out: --prompts ROWS/val_prompts.jsonl")
    settings = dataclasses.replace(
        config.eval, suites=[str(prompts)], arms=[], repeats=1, greedy=True, sampled=False, distribution_samples=0
    )
    with tempfile.TemporaryDirectory(prefix="specdec-parity-") as folder:
        result = evaluate(dataclasses.replace(config, eval=settings), head_dir, Path(folder))
    served, trained = (result["summary"][name] for name in ("acceptance_length", "trained_acceptance_length"))
    if served is None or trained is None:
        raise ValueError(f"nothing to compare: {'; '.join(result['notes']) or 'the server drafted nothing'}")
    if abs(served - trained) <= MAX_DIFFERENCE * served:
        return []
    what = f"served, the acceptance length is {served:.3f}; training measured {trained:.3f} on the same prompts"
    return [
        Finding(code="parity", what=what, fix="the server computes another head than training did: export it again")
    ]
