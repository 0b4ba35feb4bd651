"""The lengths that batches are padded to."""

from __future__ import annotations

LENGTHS_PER_OCTAVE = 8


def padded_length(length: int) -> int:
    """The next of eight lengths an octave: on a CPU kernels are made, and kept for a while, for each shape."""
    step = max(1, (1 << length.bit_length()) // (2 * LENGTHS_PER_OCTAVE))
    return length + -length % step
