"""The adapter on a stand-in for vLLM's scheduler: what it times, what it asks, and that no failure gets through."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from serving.control import Control
from serving.kept_policy import VARIABLE, keep_policy
from serving.monitor import Monitor
from serving.policy import Policy, parse_policy
from serving.policy_settings import ASYNCHRONOUS
from serving.scheduler import POLICY_VARIABLE, command, controlled


class Scheduler:
    """The names that the adapter builds on, as vLLM 0.32 has them: two running requests, r0 and r1."""

    def __init__(self, num_spec_tokens: int = 3) -> None:
        self.num_spec_tokens, self.dynamic_sd_lookup = num_spec_tokens, None
        self.requests: dict = {}
        self.running: list = []

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.running.append(request)

    def schedule(self):
        width = self.num_spec_tokens if self.dynamic_sd_lookup is None else self.dynamic_sd_lookup[2]
        output = step(2, width, width)
        self._update_after_schedule(output)
        return output

    def _update_after_schedule(self, output):
        pass

    def update_draft_token_ids(self, drafts):
        for name, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            self.requests[name].spec_token_ids = tokens

    def update_from_output(self, scheduled, output):
        return "outputs"

    def _free_request(self, request):
        return "freed"

    def make_spec_decoding_stats(self, stats, num_draft_tokens, num_accepted_tokens, num_invalid, request_id):
        return stats


OUTPUT = SimpleNamespace(sampled_token_ids=[[1, 2], [3]])


def sampling(extra_args: dict | None = None, temperature: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra_args, temperature=temperature)


def started(num_spec_tokens: int = 3, **wishes):
    scheduler = controlled(Scheduler)(num_spec_tokens)
    for i in range(2):
        name = f"r{i}"
        extra = {"specdec": wishes[name]} if name in wishes else None
        scheduler.add_request(
            SimpleNamespace(
                request_id=name, prompt_token_ids=[1], output_token_ids=[2], spec_token_ids=[],
                sampling_params=sampling(extra),
            )
        )  # fmt: skip
    return scheduler


def step(batch: int, verified: int, drafted: int, new: int = 0, prompt: int = 0):
    names = [f"r{i}" for i in range(batch)]
    return SimpleNamespace(
        scheduled_spec_decode_tokens={name: [5] * verified for name in names if verified},
        num_scheduled_tokens=dict.fromkeys(names, 1 + verified + prompt),
        scheduled_new_reqs=["r0"] * new,
        num_spec_tokens_to_schedule=drafted,
    )


def drafted(scheduler) -> dict[str, int]:
    """How many tokens of a full draft each request keeps."""
    drafts = SimpleNamespace(req_ids=list(scheduler.requests), draft_token_ids=[[7] * 3, [8] * 3])
    scheduler.update_draft_token_ids(drafts)
    return {name: len(request.spec_token_ids) for name, request in scheduler.requests.items()}


@pytest.fixture
def control():
    now = [100.0]
    found = Control(Policy(3), Monitor(3), clock=lambda: now[0])
    found.now = now
    return found


def run(control, output, seconds: float, wait: float = 0.0) -> None:
    control.now[0] += wait
    control.scheduled(output)
    control.now[0] += seconds
    control.ended(4, lambda _: True)


def test_only_steady_decode_steps_are_timed(control):
    times = control.policy.times
    run(control, step(2, 3, 3, new=1), 9.0)  # a prompt
    run(control, step(2, 3, 3, prompt=40), 9.0)  # a chunk of one
    assert control.monitor.decode_sec == 0
    run(control, step(2, 3, 0), 9.0)  # K is changing: the drafts of one width, the verification of another
    assert times.num_observed(2, 3) == times.num_observed(2, 0) == 0
    assert control.monitor.decode_sec == pytest.approx(9.0)
    run(control, step(2, 3, 3), 0.05, wait=0.01)  # what passes between two steps is part of them
    assert times.estimate(2, 3) == pytest.approx(0.06)
    run(control, step(2, 0, 0), 0.02, wait=5.0)  # an idle engine is not
    assert times.estimate(2, 0) == pytest.approx(0.02)


def lookup_step(width: int = 3):
    """Two sequences, of which only the first has found drafts."""
    output = step(2, width, width)
    output.scheduled_spec_decode_tokens.pop("r1")
    output.num_scheduled_tokens["r1"] = 1
    return output


def test_a_lookup_is_timed_as_it_comes_and_what_it_does_not_find_counts_as_rejected(control):
    run(control, step(2, 0, 3), 0.05)
    for _ in range(200):
        control.scheduled(lookup_step())
        control.drafted(SimpleNamespace(request_id="r0", prompt_token_ids=[1], output_token_ids=[2]), 3, 3)
        control.now[0] += 0.04
        control.ended(5, lambda _: True)
    assert control.policy.times.estimate(2, 3) == pytest.approx(0.04)
    first, second, _ = control.policy.acceptance.conditional_rates
    assert first == pytest.approx(0.5, abs=0.03) and second > 0.9  # half of the sequences have none
    assert control.monitor.recent.conditional_rates == [1, 1, 1]  # what was drafted was good


def test_a_short_find_counts_as_rejected_where_it_ends(control):
    run(control, step(1, 0, 3), 0.05)
    for _ in range(200):
        control.scheduled(step(1, 1, 3))
        control.drafted(SimpleNamespace(request_id="r0", prompt_token_ids=[1], output_token_ids=[2]), 1, 1)
        control.ended(2, lambda _: True)
    first, second, _ = control.policy.acceptance.conditional_rates
    assert first > 0.9 and second < 0.2
    control.added("r0", sampling({"specdec": 1}))  # a request that wants no more is no bad draft
    control.policy.acceptance.forget(1)
    for _ in range(200):
        control.scheduled(step(1, 1, 3))
        control.drafted(SimpleNamespace(request_id="r0", prompt_token_ids=[1], output_token_ids=[2]), 1, 1)
        control.ended(2, lambda _: True)
    assert control.policy.acceptance.conditional_rates[1] == pytest.approx(second, abs=0.1)


@pytest.mark.parametrize("width", [0, 1, 2])
def test_an_empty_step_says_nothing_of_what_comes_after_it(control, width):
    """vLLM gives it the widest K; in plain decode, too, nobody asked for drafts that are missing."""
    before = control.policy.acceptance.conditional_rates
    run(control, step(2, width, width), 0.05)
    for _ in range(200):
        run(control, step(0, 0, 3), 0.001)
        control.scheduled(step(1, width, width))
        if width:
            control.drafted(SimpleNamespace(request_id="r0", prompt_token_ids=[1], output_token_ids=[2]), width, width)
        control.now[0] += 0.05
        control.ended(1 + width, lambda _: True)
    rates = control.policy.acceptance.conditional_rates
    assert rates[width:] == before[width:] and all(rate > 0.9 for rate in rates[:width])
    assert control.policy.times.estimates(1, 3)[width] == pytest.approx(0.05)


def test_steps_with_sampled_sequences_are_timed_apart(control):
    control.added("r1", sampling(temperature=0.6))
    for batch, seconds in ((2, 0.2), (2, 0.2), (2, 0.2), (1, 0.05), (1, 0.05), (1, 0.05)):  # r0 alone is greedy
        run(control, step(batch, 3, 3), seconds)
    control.choose(2, ["r0", "r1"])
    assert control.policy.times.estimate(2, 3) == pytest.approx(0.2)
    assert control.policy.times.num_observed(1, 3) == 0
    control.choose(1, ["r0"])
    assert control.policy.times.estimate(1, 3) == pytest.approx(0.05)
    control.finished(SimpleNamespace(request_id="r1", prompt_token_ids=[1], output_token_ids=[2]))
    control.choose(2, ["r0", "r1"])
    assert control.policy.times.num_observed(2, 3) == 0, "r1 has ended, whoever bears its name now"


def test_a_step_that_is_scheduled_before_the_last_has_ended_is_not_mixed_up_with_it(control):
    run(control, step(2, 3, 3), 0.05)
    control.scheduled(step(2, 3, 3))
    control.scheduled(step(2, 3, 0))  # asynchronous scheduling
    control.now[0] += 0.05
    control.ended(4, lambda _: True)
    assert control.policy.times.num_observed(2, 3) == 2 and control.monitor.k_histogram == {3: 2}
    control.now[0] += 0.05
    control.ended(4, lambda _: True)
    assert control.policy.times.num_observed(2, 0) == 0 and control.monitor.k_histogram == {3: 2, 0: 1}


def test_an_engine_that_books_two_steps_in_one_go_is_timed_by_runs_of_steps():
    """Steps of 2 ms; now and then the engine is late, and finds the next step done already."""
    now = [0.0]
    control = Control(Policy(3, settings=ASYNCHRONOUS), Monitor(3), clock=lambda: now[0])
    times = control.policy.times

    def end(seconds: float) -> None:
        now[0] += seconds
        control.ended(4, lambda _: True)

    control.scheduled(step(2, 0, 3))  # the first of this K: no drafts are verified yet
    for number in range(81):
        control.scheduled(step(2, 3, 3))
        end(0.0035 if number % 8 == 2 else 0.0005 if number % 8 == 3 else 0.002)
    assert times.num_observed(2, 3) == 9
    assert times.estimate(2, 3) == pytest.approx(0.002)
    control.scheduled(step(2, 3, 3, prompt=40))
    end(0.002)
    control.scheduled(step(2, 3, 3))
    end(0.030)  # the prompt's
    for _ in range(9):
        control.scheduled(step(2, 3, 3))
        end(0.002)
    assert times.num_observed(2, 3) == 11 and times.estimate(2, 3) == pytest.approx(0.002)
    assert control.monitor.decode_sec == pytest.approx(92 * 0.002 - 0.0005, rel=0.01), "the monitor counts all"


def test_the_policy_decides_and_learns_a_step_at_a_time(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "fixed:2", "conditional_rates": [0.9, 0.8, 0.7]}')
    scheduler = started()
    assert scheduler.schedule().num_spec_tokens_to_schedule == 2
    rates = scheduler.specdec.policy.acceptance
    assert rates.conditional_rates == pytest.approx([0.9, 0.8, 0.7])
    for _ in range(200):
        assert scheduler.make_spec_decoding_stats("stats", 2, 0, None, "r0") == "stats"
    assert scheduler.update_from_output(None, OUTPUT) == "outputs"
    assert rates.conditional_rates[0] < 0.3
    status = json.loads(command(scheduler, '{"command": "status"}'))
    assert status["mode"] == "fixed" and status["policy"] == "fixed:2" and status["num_speculative_tokens"] == 2
    assert status["acceptance_length"] == 1.0 and status["totals"]["num_drafts"] == 200
    assert status["trained"]["acceptance_length"] == pytest.approx(1 + 0.9 + 0.72 + 0.504)
    assert status["totals"]["policy_usec_per_step"] > 0


def test_drafts_that_a_grammar_forbade_are_not_rejections(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, "{}")
    scheduler = started()
    scheduler.make_spec_decoding_stats(None, 3, 1, {"r0": 2}, "r0")
    scheduler.make_spec_decoding_stats(None, 3, 0, {"r1": 3}, "r1")
    scheduler.update_from_output(None, OUTPUT)
    assert scheduler.specdec.status()["totals"]["drafted_per_position"] == [1, 0, 0]


def test_a_request_has_its_own_width(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "fixed:2"}')
    scheduler = started(r0="off")
    assert scheduler.schedule().num_spec_tokens_to_schedule == 2
    assert drafted(scheduler) == {"r0": 0, "r1": 2}
    scheduler = started(r0=3, r1="auto")
    assert scheduler.schedule().num_spec_tokens_to_schedule == 3  # the widest wish; the others keep the policy's
    assert drafted(scheduler) == {"r0": 3, "r1": 2}
    scheduler = started(r0="off", r1="0")
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0
    for nonsense in (True, -1, "some", 1.5, ["off"]):
        assert started(r1=nonsense).specdec.pinned == {}
    assert drafted(started(r1=9)) == {"r0": 3, "r1": 3}  # no choice was made yet, and 9 is what the head has


def test_wishes_of_ended_requests_are_forgotten(control):
    control.added("r0", sampling({"specdec": "off"}))
    control.added("r1", sampling({"specdec": 1}))
    for _ in range(300):
        control.scheduled(step(1, 0, 0))
        control.ended(1, lambda name: name == "r1")
    assert control.pinned == {"r1": 1}


@pytest.mark.parametrize("hook", ["choose", "scheduled", "ended", "drafted", "added"])
def test_a_failing_policy_leaves_the_fixed_width_and_a_living_engine(monkeypatch, hook):
    monkeypatch.setenv(POLICY_VARIABLE, "{}")
    scheduler = started()

    def fail(*_):
        raise RuntimeError("broken policy")

    monkeypatch.setattr(scheduler.specdec, hook, fail)
    for number in range(3):
        scheduler.add_request(SimpleNamespace(request_id=f"n{number}", sampling_params=sampling({})))
        scheduler.schedule()
        scheduler.make_spec_decoding_stats(None, 3, 1, None, "r0")
        assert scheduler.update_from_output(None, OUTPUT) == "outputs"
    assert scheduler.specdec is None and scheduler.dynamic_sd_lookup is None
    assert scheduler.schedule().num_spec_tokens_to_schedule == 3
    status = json.loads(command(scheduler, '{"command": "status"}'))
    assert status["mode"] == "safe" and "broken policy" in status["reason"]
    assert status["totals"]["policy_failures"] == 1
    assert status["events"][-1]["kind"] == "failure" and "broken policy" in status["events"][-1]["what"]
    assert "broken policy" in json.loads(command(scheduler, '{"command": "policy", "policy": "auto"}'))["error"]


def test_a_vllm_without_the_names_and_a_bad_setting_leave_it_alone(monkeypatch):
    class Other(Scheduler):
        def __init__(self) -> None:
            super().__init__()
            del self.dynamic_sd_lookup

    other = controlled(Other)()
    assert other.specdec is None
    assert "dynamic_sd_lookup" in json.loads(command(other, '{"command": "status"}'))["reason"]
    monkeypatch.setenv(POLICY_VARIABLE, "no json")
    assert controlled(Scheduler)().specdec is None


def test_a_server_without_a_head_counts_too_and_has_no_policy(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "auto"}')
    scheduler = started(0, r0="off")
    assert scheduler.dynamic_sd_lookup is None
    scheduler.schedule()
    scheduler.update_from_output(None, OUTPUT)
    status = json.loads(command(scheduler, '{"command": "status"}'))
    assert status["mode"] == "plain" and status["totals"]["num_output_tokens"] == 3
    assert "draft head" in json.loads(command(scheduler, '{"command": "policy", "policy": "off"}'))["error"]


def test_questions_never_raise_and_the_policy_can_be_changed(monkeypatch):
    monkeypatch.setenv(POLICY_VARIABLE, "{}")
    scheduler = started()
    for bad in ("no json", "{}", '{"command": "policy", "policy": "fixed:9"}', '{"command": "policy", "policy": 3}'):
        assert json.loads(command(scheduler, bad))["error"]
    assert json.loads(command(scheduler, '{"command": "policy", "policy": "off"}'))["mode"] == "off"
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0
    assert json.loads(command(scheduler, '{"command": "policy", "policy": "fixed:1"}'))["policy"] == "fixed:1"
    assert scheduler.schedule().num_spec_tokens_to_schedule == 1
    static = json.loads(command(Scheduler(), '{"command": "status"}'))
    assert static["mode"] == "fixed" and static["num_speculative_tokens"] == 3


def test_an_engine_that_starts_again_goes_on_with_the_policy_that_was_put(monkeypatch, tmp_path):
    monkeypatch.setenv(POLICY_VARIABLE, '{"policy": "auto"}')
    monkeypatch.setenv(VARIABLE, str(tmp_path / "policy"))
    assert json.loads(command(started(), '{"command": "status"}'))["policy"] == "auto"
    keep_policy("fixed:1")
    assert json.loads(command(started(), '{"command": "status"}'))["policy"] == "fixed:1"


def test_finished_requests_are_kept_when_asked(monkeypatch, tmp_path):
    keep = {"directory": str(tmp_path), "share": 1.0, "max_bytes": 10**6}
    monkeypatch.setenv(POLICY_VARIABLE, json.dumps({"traffic": keep}))
    scheduler = started()
    assert scheduler._free_request(scheduler.requests["r0"]) == "freed"
    scheduler.specdec.traffic.close()
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text()) == {"prompt_ids": [1], "completion_ids": [2]}


def test_policies_as_typed():
    assert parse_policy("auto") == ("auto", None) and parse_policy("off") == ("off", None)
    assert parse_policy("fixed:2") == ("fixed", 2)
    for text in ("fixed", "fixed:x", "on", "auto:3"):
        with pytest.raises(ValueError, match="auto, off or fixed:K"):
            parse_policy(text)
