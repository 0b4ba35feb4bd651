"""Parts that a result tree seldom has, and a tree that has all of them."""

from __future__ import annotations

import re
from typing import Any

from tests.result_tree import PLAIN, Tree, arm, cell, make_result, sweep


def fork(verdict: str = "numeric tie", **changes: Any) -> Tree:
    """One greedy fork."""
    return {
        "suite": "prompts", "item_id": "3", "position": 17, "plain_token": 11, "spec_token": 12, "plain_text": " a",
        "spec_text": " b", "margin_nats": 0.01, "margin_is_lower_bound": False, "verdict": verdict,
        "why": "the tokens lie 0.0100 nats apart", "prompt_excerpt": "What is 2 | 3?\nSay why.", **changes,
    }  # fmt: skip


def distribution(name: str = "spec", lossy: bool | None = True) -> Tree:
    """One two-sample test."""
    return {
        "arm": name, "p_value": 0.0005 if lossy else 0.42, "statistic": 5.1, "num_prompts": 4, "num_samples": 200,
        "num_positions": 4, "lossy": lossy,
        "worst": [
            {"item_id": "prompts/1", "position": 2, "tokens": [
                {"token": 5, "baseline": 0.61, "arm": 0.31}, {"token": None, "baseline": 0.0, "arm": 0.1}]}
        ] if lossy else [],
    }  # fmt: skip


def rich_result() -> Tree:
    """Everything at once: four arms, one of them synthetic, five loads, forks, a lossy arm, a price, errors."""
    arms = [PLAIN, arm("eagle3 K=3"), arm("ngram K=5", 5), arm("surface", 3, synthetic=True)]
    budgets = [
        cell(f"sampled b{budget}", 0.6, thinking_budget=budget, num_samples=4, max_new_tokens=8192)
        for budget in (256, 1024, 4096)
    ]
    result = make_result(
        arms, [*sweep(1, 2, 4, 8, 16), *budgets], ("gsm8k", "math500", "aime24"), 20, thinks=True, scored=True,
        varies=True, price=2.49,
    )  # fmt: skip
    result["summary"] |= {"trained_acceptance_length": 2.31, "trained_per_position_rates": [0.68, 0.43, 0.27]}
    result["summary"]["greedy_identity_rate"] = 0.95
    result["losslessness"]["greedy"][0] |= {"greedy_identity_rate": 0.95, "forks": [fork()]}
    result["losslessness"]["greedy"][1] |= {
        "greedy_identity_rate": 0.9,
        "forks": [fork(), fork("divergence: bug?", margin_nats=2.5, margin_is_lower_bound=True)],
    }
    result["losslessness"]["distribution"] = [distribution("ngram K=5"), distribution("eagle3 K=3", lossy=False)]
    result["requests"][3] |= {"error": "timeout", "error_detail": "no answer in 600 s", "tpot_sec": None}
    result |= {
        "errors": {"timeout": 1}, "client_cpu_share": 0.71,
        "notes": [
            "greedy c1: TPOT of the same prompt differed by 14% between repeats: the machine was not quiet",
            "greedy c16: the client itself used 71% of a core while plain was measured: the timings may be its own",
        ],
        "timings_in_doubt": True,
    }  # fmt: skip
    return result


def check_self_contained(page: str) -> None:
    """Assert that a page needs nothing but itself and runs nothing."""
    markup = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "data:", page)
    sources = re.findall(r'(?:src|href|action|srcset|data)\s*=\s*["\']?([^"\'\s>]*)', re.sub(r">[^<]*<", "><", markup))
    assert all(source.startswith(("data:", "#")) for source in sources), sources
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(|\son\w+=", markup, re.IGNORECASE)
