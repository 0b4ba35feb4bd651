"""What the policy knows of acceptance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.acceptance import AcceptanceModel


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=200))
def test_rates_stay_rates(drafts):
    model = AcceptanceModel([0.5] * 3, window=50.0, prior_weight=8.0)
    for drafted, accepted in drafts:
        model.observe(drafted, min(drafted, accepted))
    assert all(0 <= rate <= 1 for rate in model.conditional_rates)
    lengths = [model.expected_tokens(k) for k in range(4)]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[-1] <= 4
