"""The lengths that batches are padded to."""

from __future__ import annotations

LENGTHS_PER_OCTAVE = 8


def padded_length(length: int) -> int:
    """The next of eight lengths an octave. On a CPU the kernels of each new shape stay for good, a megabyte each."""
    step = max(1, (1 << length.bit_length()) // (2 * LENGTHS_PER_OCTAVE))
    return length + -length % step
