"""The two-sample test on samplers whose difference is known, and the collecting of samples from a fake client."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time

import numpy as np
import pytest

from specdec.evaluation import distribution
from specdec.evaluation.distribution import Samples, collect_samples, prefix_surprises, two_sample_test
from specdec.evaluation.records import RequestResult

NUM_PROMPTS, NUM_SAMPLES, NUM_TOKENS, VOCAB = 8, 64, 6, 64


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Model:
    """Next-token logits by prompt and previous token, some contexts nearly certain and some wide open."""

    def __init__(self, seed=0, num_prompts=NUM_PROMPTS):
        self.rng = np.random.default_rng(seed)
        scale = self.rng.uniform(2, 6, size=(num_prompts, VOCAB, 1))
        self.logits = self.rng.normal(size=(num_prompts, VOCAB, VOCAB)) * scale  # 1.4 nats of entropy on average
        # What a poor draft head proposes: the target gives it a chance of 1 in 7 on average.
        self.drafts = (self.logits + 6 * self.rng.normal(size=self.logits.shape)).argmax(-1)

    def sample(self, temperature=1.0, top_p=1.0, forced=0.0, num_samples=NUM_SAMPLES, num_tokens=NUM_TOKENS):
        """``forced`` is the chance that a draft is taken whatever its probability (never at position 0)."""
        probs = softmax(self.logits / temperature)
        if top_p < 1:
            order = np.argsort(-probs, -1)
            ranked = np.take_along_axis(probs, order, -1)
            kept = np.zeros(probs.shape, dtype=bool)
            np.put_along_axis(kept, order, ranked.cumsum(-1) - ranked < top_p, -1)
            probs = probs * kept / (probs * kept).sum(-1, keepdims=True)
        samples = {}
        for prompt, table in enumerate(probs):
            tokens = np.zeros((num_samples, num_tokens), dtype=int)
            before = np.zeros(num_samples, dtype=int)
            for i in range(num_tokens):
                draws = self.rng.random((num_samples, 1))
                before_tokens, before = before, np.minimum((table[before].cumsum(-1) < draws).sum(-1), VOCAB - 1)
                if i:
                    take = self.rng.random(num_samples) < forced
                    before = np.where(take, self.drafts[prompt][before_tokens], before)
                tokens[:, i] = before
            samples[f"p{prompt}"] = [tuple(row) for row in tokens.tolist()]
        return samples

    def surprises(self, *drawn):
        """What ``prefix_surprises`` would learn from the server."""
        probs = softmax(self.logits)
        least = np.sort(probs, -1)[..., -20:][..., :1]
        known = np.log(np.maximum(probs, least)) ** 2
        top = probs * (probs >= least)
        known -= (known * top).sum(-1, keepdims=True) / top.sum(-1, keepdims=True)
        return {
            prompt: {
                row[: i + 1]: float(known[int(prompt[1:]), row[i - 1] if i else 0, row[i]])
                for samples in drawn
                for row in samples[prompt]
                for i in range(len(row))
            }
            for prompt in drawn[0]
        }

    def broken_dependence(self, samples):
        """Every position keeps its tokens; which of them follow one another is drawn anew."""
        return {
            prompt: list(
                zip(*(self.rng.permutation(column).tolist() for column in zip(*rows, strict=True)), strict=True)
            )
            for prompt, rows in samples.items()
        }


@pytest.mark.parametrize("with_surprises", [False, True])
def test_the_null_is_calibrated(with_surprises):
    p_values = []
    for seed in range(200):
        model = Model(seed, num_prompts=3)
        baseline, other = (model.sample(num_samples=n, num_tokens=4) for n in (24, 20))
        surprises = model.surprises(baseline, other) if with_surprises else None
        found = two_sample_test(baseline, other, resamples=199, seed=seed, alpha=0.05, surprises=surprises)
        p_values.append(found["p_value"])
    # 200 draws with 5 %: 10 expected, 2 to 20 in 99.7 of 100 such tests; half of them below the middle.
    assert 2 <= sum(p <= 0.05 for p in p_values) <= 20
    assert 75 <= sum(p <= 0.5 for p in p_values) <= 125


@pytest.mark.parametrize("seed", [0, 1])
def test_identical_samplers_are_not_lossy(seed):
    model = Model(seed)
    found = two_sample_test(model.sample(), model.sample())
    assert not found["lossy"] and found["p_value"] > 0.01


@pytest.mark.parametrize(
    "lossy",
    [
        pytest.param(lambda model: (model.sample(), model.sample(forced=0.4)), id="many drafts always accepted"),
        pytest.param(lambda model: (model.sample(0.7), model.sample(1.0)), id="temperature ignored"),
        pytest.param(lambda model: (model.sample(top_p=0.9), model.sample()), id="top-p ignored"),
        pytest.param(
            lambda model: (model.sample(), model.broken_dependence(model.sample())),
            id="right marginals, wrong sequence",
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_lossy_samplers_are_caught(lossy, seed):
    baseline, other = lossy(Model(seed))
    found = two_sample_test(baseline, other)
    assert found["lossy"] and found["p_value"] < 0.001


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_in_ten_always_accepted_is_caught_by_the_surprise(seed):
    model = Model(seed)
    baseline, lossy, honest = model.sample(), model.sample(forced=0.1), model.sample()
    surprises = model.surprises(baseline, lossy, honest)
    assert two_sample_test(baseline, lossy, surprises=surprises)["lossy"]
    assert not two_sample_test(baseline, honest, surprises=surprises)["lossy"]


def test_only_the_sequence_tells_in_the_extreme():
    # Fair coins at both positions; in the arm the second repeats the first.
    baseline = {"p": [(0, 0), (0, 1), (1, 0), (1, 1)] * 16}
    other = {"p": [(0, 0), (1, 1)] * 32}
    found = two_sample_test(baseline, other)
    assert found["lossy"] and found["worst"] == []  # no single position differs


def test_dependence_across_more_than_two_tokens_is_seen():
    # Any two of the three tokens are independent coins; in the arm the third is the parity of the others.
    bits = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    baseline, other = {"p": bits * 8}, {"p": [(a, b, a ^ b) for a, b, _ in bits] * 8}
    assert two_sample_test(baseline, other)["lossy"]


def test_the_worst_position_and_its_tokens_are_named():
    model = Model(3)
    baseline, other = model.sample(), model.sample()
    other["p2"] = [(*row[:4], 999, *row[5:]) if i < 40 else row for i, row in enumerate(other["p2"])]
    found = two_sample_test(baseline, other)
    assert found["lossy"] and len(found["worst"]) == 3
    first = found["worst"][0]
    assert (first["item_id"], first["position"]) == ("p2", 4)
    assert first["tokens"][0] == {"token": 999, "baseline": 0.0, "arm": 0.625}
    assert (found["num_prompts"], found["num_samples"], found["num_positions"]) == (8, 64, 6)
    assert json.loads(json.dumps(found)) == found


def test_ending_early_is_a_difference():
    baseline = {"p": [(5, 6, 7)] * 64}
    other = {"p": [(5, 6, 7)] * 40 + [(5, 6)] * 24}
    found = two_sample_test(baseline, other)
    assert found["lossy"] and found["worst"][0]["position"] == 2
    assert {"token": None, "baseline": 0.0, "arm": 0.375} in found["worst"][0]["tokens"]


def test_certain_outputs_say_nothing_against_the_arm():
    rows = {"p": [(5, 6, 7)] * 64}
    found = two_sample_test(rows, rows)
    assert (found["p_value"], found["statistic"], found["lossy"], found["worst"]) == (1.0, 0.0, False, [])


def test_nothing_to_compare_is_no_verdict():
    rows = [(1, 2)] * 8
    for baseline, other in (({}, {}), ({"a": rows}, {"b": rows}), ({"a": rows}, {"a": []})):
        found = two_sample_test(baseline, other)
        assert (found["p_value"], found["statistic"], found["lossy"], found["num_prompts"]) == (None, None, None, 0)


def test_prompts_of_one_arm_alone_are_left_out():
    model = Model(4)
    baseline, other = model.sample(), model.sample()
    del other["p0"]
    found = two_sample_test(baseline, other)
    assert found["num_prompts"] == 7 and not found["lossy"]


def test_the_same_seed_gives_the_same_result():
    model = Model(5, num_prompts=2)
    baseline, other = model.sample(), model.sample()
    results = [two_sample_test(baseline, other, resamples=300, seed=seed, alpha=0.01)["p_value"] for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_too_few_resamples_are_refused():
    with pytest.raises(ValueError, match="take at least 1000"):
        two_sample_test({}, {}, resamples=999)


def test_it_is_fast_at_default_sizes():
    model = Model(6)
    baseline, other = model.sample(), model.sample()
    start = time.process_time()
    two_sample_test(baseline, other)
    assert time.process_time() - start < 6  # CPU seconds of all threads; a Python loop over resamples takes minutes


class Client:
    """Answers with the number of the request; knows how many were in flight at once."""

    def __init__(self, fail=lambda number: None):
        self.fail, self.bodies, self.in_flight, self.most = fail, [], 0, 0

    async def chat(self, messages, max_tokens, temperature):
        self.bodies.append((messages, max_tokens, temperature))
        number = len(self.bodies)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0)
        self.in_flight -= 1
        error = self.fail(number)
        if error == "silent":
            return RequestResult()
        return RequestResult(error=error, prompt_token_ids=[7, 8], token_ids=[number, 0, 0])


def collect(client, **changes):
    options = {"prompts": {"a": "first", "b": "second"}, "num_samples": 5, "num_tokens": 3, "concurrency": 4, **changes}
    return asyncio.run(collect_samples(client, **options))


def test_samples_are_collected_by_prompt():
    client = Client()
    samples = collect(client)
    assert samples.by_prompt["a"] == [(i, 0, 0) for i in (1, 3, 5, 7, 9)]  # the prompts take turns
    assert samples.by_prompt["b"] == [(i, 0, 0) for i in (2, 4, 6, 8, 10)] and not samples.errors
    assert client.bodies[1] == ([{"role": "user", "content": "second"}], 3, 1.0)
    assert client.most == 4 and samples.prompt_token_ids == {"a": [7, 8], "b": [7, 8]}


def test_failures_are_counted_by_kind_and_never_samples():
    samples = collect(Client(lambda number: {1: "timeout", 2: "silent", 4: "timeout"}.get(number)))
    assert (len(samples.by_prompt["a"]), len(samples.by_prompt["b"])) == (4, 3)
    assert samples.errors == {"timeout": 2, "no_token_ids": 1}
    silent = collect(Client(lambda number: "timeout"))
    assert silent.by_prompt == {"a": [], "b": []} and silent.prompt_token_ids == {}


@pytest.mark.parametrize("option", ["num_samples", "num_tokens", "concurrency"])
def test_counts_must_be_positive(option):
    with pytest.raises(ValueError, match="at least 1"):
        collect(Client(), **{option: 0})


class LogprobClient:
    """Knows two tokens by context; counts what it is asked."""

    def __init__(self):
        self.asked = []

    async def next_token_logprobs(self, token_ids, num_top=5):
        self.asked.append((tuple(token_ids), num_top))
        return {3: -math.log(2), 4: -(1 + len(token_ids)) * math.log(2)}


def test_every_context_is_asked_for_once():
    client = LogprobClient()
    drawn = [Samples(by_prompt={"a": [(3, 4), (3, 9)], "b": [(3,)]}), Samples(by_prompt={"a": [(4, 3), (3, 4)]})]
    surprises = asyncio.run(prefix_surprises(client, {"a": [7, 8]}, drawn, concurrency=2))
    assert sorted(client.asked) == [((7, 8), 20), ((7, 8, 3), 20), ((7, 8, 4), 20)]  # b has no token ids
    # After the prompt 3 has a half and 4 an eighth: (ln 2)² and (3 ln 2)², on average (0.5 + 9 / 8) / (5 / 8) = 2.6.
    nats = math.log(2) ** 2
    assert surprises["a"].keys() == {(3,), (4,), (3, 4), (3, 9), (4, 3)}
    assert surprises["a"][(3,)] == pytest.approx((1 - 2.6) * nats)
    assert surprises["a"][(4,)] == pytest.approx((9 - 2.6) * nats)
    # Token 9 is not among the likeliest: it counts like the last of them.
    assert surprises["a"][(3, 9)] == surprises["a"][(3, 4)] > surprises["a"][(4,)]


def test_unknown_surprise_does_not_speak():
    rows = [(1, 2), (3, 4)] * 32
    known = two_sample_test({"p": rows}, {"p": rows}, surprises={"other": {(1,): 9.0}})
    assert known == two_sample_test({"p": rows}, {"p": rows})


def test_scoring_a_part_of_the_contexts_favours_no_arm(monkeypatch):
    monkeypatch.setattr(distribution, "MAX_CONTEXTS", 256)
    rng = random.Random(2)
    prompt_token_ids = {name: [1] for name in "abcd"}

    def arm() -> Samples:
        rows = {name: [tuple(rng.randrange(200) for _ in range(5)) for _ in range(64)] for name in prompt_token_ids}
        return Samples(by_prompt=rows, prompt_token_ids=prompt_token_ids)

    class Client:
        async def next_token_logprobs(self, token_ids, num_top=5):
            return {token: -0.5 * token - 0.5 for token in range(num_top)}

    first, second = arm(), arm()
    surprises = asyncio.run(prefix_surprises(Client(), prompt_token_ids, [first, second], 8))
    assert not two_sample_test(first.by_prompt, second.by_prompt, surprises=surprises)["lossy"]
