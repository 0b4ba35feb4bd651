"""Which batch shapes vLLM captures CUDA graphs for, so that another K than the largest finds one.

vLLM 0.32 captures a graph for each query length that its table of K by batch size names, K + 1 tokens a sequence, and
each up to the largest batch that has that K. Without a table it captures for the largest K alone, and each step at
another one is launched kernel by kernel. The table decides nothing here: the policy stands in its place.
"""

from __future__ import annotations

from typing import Any

# Their drafts run on the runner that captures whole steps for each K; on the older one a table would forbid that.
METHODS = ("eagle", "eagle3", "mtp", "draft_model")


def with_every_width(speculative: dict[str, Any], max_num_seqs: int) -> dict[str, Any]:
    """``--speculative-config`` with a table in which each K, 0 to the largest, stands for some batch size.

    The largest K has all sizes but the last few, of which each of the others gets one: so graphs of all K reach nearly
    as far. Where there are fewer sizes than numbers, the smallest K are named.
    """
    if speculative.get("method") not in METHODS or speculative.get("parallel_drafting"):
        return speculative
    widest = int(speculative["num_speculative_tokens"])
    num_named = min(widest, max_num_seqs - 1)
    table = [(1, max_num_seqs - num_named, widest)]
    table += [(max_num_seqs - width, max_num_seqs - width, width) for width in reversed(range(num_named))]
    return {**speculative, "num_speculative_tokens_per_batch_size": table}
