"""What the doctor may find."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, or that vLLM would take in another way than it was meant."""

    code: str  # stable, for machines: "d2t-absolute"
    what: str
    fix: str
