"""A worker that notes each call of its head in the file ``$HEAD_CALLS`` (``--worker-extension-cls``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

propose = SpecDecodeBaseProposer.propose


def counted(self: Any, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
    with Path(os.environ["HEAD_CALLS"]).open("a") as calls:
        calls.write(f"{num_speculative_tokens}\n")
    return propose(self, num_speculative_tokens, *args, **kwargs)


SpecDecodeBaseProposer.propose = counted  # type: ignore[method-assign]


class Worker:
    """Adds nothing: importing this module is what counts."""
