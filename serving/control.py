"""Between the policy, the monitor and a scheduler: what the scheduler reports, what it is told. No vLLM import."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from serving.draft_rates import DraftRates
from serving.head_watch import WINDOW, HeadWatch
from serving.kept_times import KeptTimes
from serving.monitor import Draft, Monitor, SpanTracker, position_bucket
from serving.policy import AUTO, FIXED, OFF, Policy, parse_policy
from serving.step_times import bucket
from serving.traffic import TrafficLog

logger = logging.getLogger("vllm.specdec")

CALIBRATION = "specdec-calibration"  # how the ids of requests begin that nobody has sent
IDLE_SEC = 0.05  # a longer wait for the next step is an idle engine, and no part of the step
FORGET_EVERY = 256  # steps between two looks for ended requests
WHOLE_EVERY = 16  # of the steps that draft, one is verified whole: what it accepts is not chosen by confidence
RECORD_SEC = 0.2  # between two times that the monitor is told of drafts, unless it is asked


class Step(NamedTuple):
    """One that was scheduled and has not ended. Unless it only decodes, its time counts not."""

    begun_sec: float
    asked: int  # K of the step before, whose drafts this one verifies
    width: int  # K
    batch: int = 0  # sequences, if it only decodes
    steady: bool = False  # whether its time is that of its batch and K
    num_without: int = 0  # sequences that were to have drafts and got none
    sampled: bool = False  # not all of them are greedy
    is_cut: bool = False  # whether only some of the draft tokens are verified,
    kept: Mapping[int, int] = {}  # and, if it only decodes, how many tokens are left -> of how many sequences

    @property
    def num_cut(self) -> float:
        """Draft tokens of a sequence, in the mean, that are not verified although K asks for them."""
        if not self.kept or self.asked != self.width:
            return 0.0
        return self.width - sum(length * count for length, count in self.kept.items()) / self.batch


@dataclass(slots=True)
class Run:
    """Steps of one kind whose time is taken together."""

    kind: tuple[int, int, bool] | None = None  # batch size, K, and whether some are not greedy
    batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    num_cut: float = 0.0  # draft tokens a sequence that were not verified
    is_broken: bool = True  # whether the last step was of another kind


class Control:
    """Feeds policy and monitor from what a scheduler does, and answers for them. ``policy`` is None without a head."""

    def __init__(
        self,
        policy: Policy | None,
        monitor: Monitor,
        spans: SpanTracker | None = None,
        trained_rates: Iterable[float] = (),
        traffic: TrafficLog | None = None,
        times_path: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy, self.monitor, self.spans, self.clock = policy, monitor, spans or SpanTracker(), clock
        self.trained_rates, self.traffic = list(trained_rates), traffic
        self.kept_times = KeptTimes(policy, Path(times_path)) if policy is not None and times_path else None
        self.started_sec = clock()
        self.overhead_sec = 0.0  # of the hooks
        self.failures = 0
        self._lately = DraftRates(self._max_width(), WINDOW)
        self.watch: HeadWatch | None = None  # of a head that was swapped in
        self.on_verdict: Callable[[], None] = lambda: None  # called once the watch has one
        self.pinned: dict[str, int] = {}  # request -> its own number of draft tokens
        self.sampled: set[str] = set()  # requests that are not greedy
        self._auto_width = policy.max_draft_tokens if policy is not None else 0  # of requests that are not pinned
        self._drafts: Counter[tuple[int, int, int, str]] = Counter()  # as Draft, which the monitor has not been told of
        self._recorded_sec = self.started_sec
        self._tries: Counter[tuple[int, int]] = Counter()  # of the step that runs: tokens asked for, accepted
        self._ended_sec: float | None = None
        self._steps: deque[Step] = deque(maxlen=16)  # asynchronous: the next is scheduled before the last has ended
        self._asked = 0
        self._is_cut = self._is_calibration = False  # the drafts of the last step, and that step
        self._num_drafting = 0  # steps whose drafts could be cut
        self._run = Run()
        self._reported: int | None = None
        self._steps_to_forget = FORGET_EVERY

    # What the scheduler asks

    def choose(self, batch: int, running: Iterable[str]) -> int:
        """K for the drafts that follow a step of ``batch`` sequences; ``running``: the requests' ids."""
        assert self.policy is not None
        requests = list(running)
        self._is_calibration = bool(requests) and requests[0].startswith(CALIBRATION)
        width = self.policy.choose(batch, not self.sampled.isdisjoint(requests), self._is_calibration)
        self._auto_width = width
        if self.policy.chosen != self._reported:
            self._reported = self.policy.chosen
            logger.info("specdec: K=%d (%s)", self.policy.chosen, self.policy.reason)
            self.monitor.event(self._now(), "policy", f"K={self.policy.chosen}: {self.policy.reason}")
        if not self.pinned:
            return width
        return max((self.pinned.get(request_id, width) for request_id in requests), default=width)

    def limits(self, request_ids: Iterable[str]) -> dict[str, int]:
        """How many draft tokens these requests may keep; those that are left out keep all."""
        if not self.pinned:
            return {}
        return {request_id: self.pinned.get(request_id, self._auto_width) for request_id in request_ids}

    def cut(self, request_ids: Sequence[str], log_probs: Sequence[Sequence[float]] | None) -> dict[str, int]:
        """The same for drafts that have come. ``log_probs``: by request and draft token, of how likely it and all
        before it are; None: that is not known."""
        self._is_cut = False
        if self.pinned:
            return self.limits(request_ids)
        if self.policy is None or not log_probs or self._is_calibration or self.watch is not None:
            return {}
        threshold = self.policy.threshold(len(request_ids))
        self._num_drafting += 1
        if threshold is None or self._num_drafting % WHOLE_EVERY == 0:
            return {}
        self._is_cut, least = True, math.log(threshold)
        kept = (sum(each >= least for each in draft) for draft in log_probs)
        return {name: n for name, n, draft in zip(request_ids, kept, log_probs, strict=True) if n < len(draft)}

    # What the scheduler reports

    def added(self, request_id: str, sampling: Any) -> None:
        """A new request; in its sampling parameters ``extra_args["specdec"]`` may be off, auto or a number."""
        if sampling.temperature > 0:
            self.sampled.add(request_id)
        wish = str((sampling.extra_args or {}).get("specdec", AUTO))
        if self.policy is not None and (wish == OFF or wish.isdecimal()):
            self.pinned[request_id] = 0 if wish == OFF else min(int(wish), self.policy.max_draft_tokens)

    def scheduled(self, output: Any) -> None:
        """A step is about to run. Only decode steps count, for the policy those that verify the K that they draft."""
        begun_sec = self.clock()
        drafts, tokens = output.scheduled_spec_decode_tokens, output.num_scheduled_tokens
        # An empty step, as one of an engine that was paused, drafts nothing: the drafts of the one before it remain.
        asked, width = self._asked, output.num_spec_tokens_to_schedule if tokens else self._asked
        self._asked = width
        is_cut = asked > 0 and self._is_cut
        lengths = Counter(map(len, drafts.values()))
        lengths[0] += len(tokens) - len(drafts)
        num_decoded = len(tokens) + sum(length * count for length, count in lengths.items())
        if not tokens or output.scheduled_new_reqs or sum(tokens.values()) != num_decoded:
            self._steps.append(Step(begun_sec, asked, width, is_cut=is_cut))
            return
        # A lookup drafts what it finds. Its steps are timed as they come, and what it did not find counts as rejected.
        steady = lengths[width] == len(tokens) or (asked == width and not self.pinned)
        num_without = lengths[0] if asked and not self.pinned else 0
        sampled = not self.sampled.isdisjoint(tokens)
        kept = lengths if is_cut else {}
        step = Step(begun_sec, asked, width, len(tokens), steady, num_without, sampled, is_cut, kept)
        self._steps.append(step)

    def finished(self, request: Any) -> None:
        """A request has ended."""
        self.sampled.discard(request.request_id)
        if self.traffic is not None and not request.request_id.startswith(CALIBRATION):
            self.traffic.finished(request.prompt_token_ids or (), request.output_token_ids)

    def drafted(self, request: Any, num_drafted: int, num_accepted: int) -> None:
        """One sequence's verification."""
        output_ids = request.output_token_ids
        step = self._steps[0] if self._steps else Step(0.0, 0, 0)
        asked = 0 if self.pinned else step.asked
        if step.batch or not step.is_cut:  # else those without a draft token were not counted
            self._tries[max(asked, num_drafted), num_accepted] += 1
        if step.is_cut:
            return
        span = self.spans.span(request.request_id, request.prompt_token_ids or (), output_ids)
        self._drafts[num_drafted, num_accepted, position_bucket(len(output_ids)), span] += 1
        if self.watch is not None:
            self.watch.observe(request.request_id, num_drafted, num_accepted)

    def ended(self, num_tokens: int, is_alive: Callable[[str], bool]) -> None:
        """The step's ``num_tokens`` output tokens are booked. ``is_alive`` tells whether a request still exists."""
        now = self.clock()
        step = self._steps.popleft() if self._steps else Step(now, 0, 0)
        if self.policy is not None:
            self._tries[step.asked, 0] += step.num_without
            tries = {kind: count for kind, count in self._tries.items() if kind[0] and count}
            if tries:
                self.policy.observe_drafts(tries)
            self.policy.cut.observe(step.asked, step.kept)
        self._tries.clear()
        if now - self._recorded_sec >= RECORD_SEC:
            self._record()
        if self.watch is not None and self.watch.verdict is not None:
            self.on_verdict()
        if step.batch:
            waited = self._ended_sec is None or step.begun_sec - self._ended_sec > IDLE_SEC
            seconds = now - (step.begun_sec if waited or self._ended_sec is None else self._ended_sec)
            self._time(step, seconds)
            plain = self._plain_tok_per_sec
            self.monitor.observe_step(step.batch, step.width, seconds, num_tokens, self._now(), plain)
        else:
            self._run.is_broken = True
        self._ended_sec = now
        self._steps_to_forget -= 1
        if self._steps_to_forget == 0:
            self._steps_to_forget = FORGET_EVERY
            self.pinned = {name: width for name, width in self.pinned.items() if is_alive(name)}
            self.spans.forget([name for name in self.spans.known if not is_alive(name)])

    def _record(self) -> None:
        """Tell the monitor of the drafts since the last time: a hundred sequences' at once cost no more than one's."""
        for kind, count in self._drafts.items():
            draft = Draft(*kind)
            self.monitor.observe_drafts(draft, count, self._now())
            self._lately.record(draft.num_drafted, draft.num_accepted, count)
        self._drafts.clear()
        self._recorded_sec = self.clock()
        if self.kept_times is not None:
            self.kept_times.save(self._now())

    def _time(self, step: Step, seconds: float) -> None:
        """Tell the policy how long such a step takes, once ``steps_per_time`` of its kind have ended.

        Where they are several, one that follows another kind of step does not count: it began while that one ran.
        """
        if self.policy is None:
            return
        size, run = self.policy.settings.steps_per_time, self._run
        kind = bucket(step.batch), step.width, step.sampled
        follows, run.is_broken = not run.is_broken, not step.steady
        if not step.steady or (size > 1 and not follows):
            return
        if kind != run.kind:
            run.kind, run.batches, run.seconds, run.num_cut = kind, [], 0.0, 0.0
        run.batches.append(step.batch)
        run.seconds += seconds
        run.num_cut += step.num_cut
        if len(run.batches) == size:
            batch = round(sum(run.batches) / size)
            self.policy.observe_step(batch, step.width, run.seconds / size, step.sampled, run.num_cut / size)
            run.batches, run.seconds, run.num_cut = [], 0.0, 0.0

    # What a swap of the head does

    @property
    def lately(self) -> DraftRates:
        """Of the head that drafts."""
        self._record()
        return self._lately

    def start_over(self, trained_rates: Iterable[float], lately: DraftRates | None = None) -> None:
        """Another head drafts from now on; ``lately``: what its drafts came to when it drafted before."""
        self.trained_rates = list(trained_rates)
        self._record()  # the other head's
        self._lately = lately or DraftRates(self._max_width(), WINDOW)
        self.monitor.new_head(self.trained_rates)
        if self.policy is not None:
            self.policy.new_head(self.trained_rates)

    def calibrated(self) -> None:
        """What was done so far only served to time steps."""
        width = self._max_width()
        self._drafts.clear()
        self.monitor = Monitor(width, self.trained_rates)
        self.start_over(self.trained_rates, DraftRates(width, WINDOW))
        if self.policy is not None:
            self.policy.calibrated()
        if self.kept_times is not None:
            self.kept_times.write()

    def failed(self, what: str) -> None:
        """A hook raised; nobody asks any more."""
        self.failures += 1
        self.event("failure", what)

    def event(self, kind: str, what: str) -> None:
        """For the status' list of events."""
        self.monitor.event(self._now(), kind, what)

    # What people ask

    def set_policy(self, text: str) -> None:
        """Raises:
        ValueError: not a policy, more draft tokens than the head has, or a server without a head.
        """
        mode, width = parse_policy(text)
        if self.policy is None:
            raise ValueError("this server runs without a draft head: there is no policy to set")
        self.policy.set_mode(mode, width)
        self.monitor.event(self._now(), "policy", f"set to {text}")

    def status(self, safe_reason: str | None = None) -> dict[str, Any]:
        """The engine's part of /specdec/status. ``safe_reason``: why the policy is off for good, if it is."""
        self._record()
        policy, figures = self.policy, self.monitor.status()
        totals = figures["totals"]
        totals["policy_failures"] = self.failures
        steps = totals["num_steps"]
        totals["policy_usec_per_step"] = 1e6 * self.overhead_sec / steps if steps else None
        return {
            "mode": "safe" if safe_reason else self._mode(),
            "policy": self._policy_text() if policy is not None and not safe_reason else None,
            "num_speculative_tokens": self._max_width() if safe_reason else self._width(),
            "max_speculative_tokens": self._max_width(),
            "timed_batch_sizes": policy.timed_batch_sizes if policy is not None else [],
            "trained": {
                "acceptance_length": self.monitor.drift.trained_length if self.trained_rates else None,
                "conditional_rates": self.trained_rates,
            },
            "reason": safe_reason or self.monitor.drift.reason or self._policy_reason(),
            "uptime_sec": self._now(),
            **figures,
        }

    def _mode(self) -> str:
        if self.policy is None:
            return "plain"
        if self.policy.mode != AUTO:
            return self.policy.mode  # off, fixed
        return "speculating" if self.policy.chosen else "plain"

    def _policy_text(self) -> str:
        assert self.policy is not None
        return f"{FIXED}:{self.policy.fixed}" if self.policy.mode == FIXED else self.policy.mode

    def _policy_reason(self) -> str | None:
        if self.policy is None:
            return None
        return self.policy.reason if self.policy.mode == AUTO else f"set to {self._policy_text()}"

    def _width(self) -> int:
        return self.policy.width if self.policy is not None else 0

    def _max_width(self) -> int:
        return self.policy.max_draft_tokens if self.policy is not None else 0

    def _plain_tok_per_sec(self, batch: int) -> float | None:
        seconds = self.policy.times.estimate(batch, 0) if self.policy is not None else None
        return batch / seconds if seconds else None

    def _now(self) -> float:
        return self.clock() - self.started_sec
