"""How many tokens to draft in the next step: the number that gives most tokens a second, by what was measured.

Acceptance alone is the wrong trigger: in a large batch it stays high while verification costs more than it gains. So
each candidate K is judged by the tokens a second that a sequence is expected to get:

    goodput(K) = E(K) / T(batch, K),    E(K) = 1 + c1 + c1 c2 + ... + c1 ... cK,

with c the conditional acceptance rates of the last drafts (the first one as it is with this K, see ``AcceptanceModel``)
and T the typical time of decode steps (a machine's pauses have nothing to do with K). K = 0 is plain decode. Steps that
also read prompts do not count: what prompts cost for each token that is put out is much the same for every K (measured,
``experiments/LOG.md``). What is not known is tried (once per batch size, a few steps each; until that succeeds, the
nearest batch size that is known decides), what may have changed is tried again: soon after a change, for a first trial
may have met a cold or busy machine, and then further and further apart, until trials cost next to nothing. Pure Python;
knows no server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.acceptance import AcceptanceModel
from serving.draft_cut import CUT_DOUBT, DraftCut
from serving.policy_settings import PolicySettings
from serving.step_times import StepTimes, bucket

AUTO, OFF, FIXED = "auto", "off", "fixed"
STATIC = "static"  # no policy: vLLM's own scheduler, K at every step


def parse_policy(text: str) -> tuple[str, int | None]:
    """``auto``, ``off`` or ``fixed:K`` to the mode and K.

    Raises:
        ValueError: anything else.
    """
    mode, colon, width = text.partition(":")
    if mode in (AUTO, OFF) and not colon:
        return mode, None
    if mode == FIXED and width.isdecimal():
        return mode, int(width)
    raise ValueError(f"policy must be auto, off or fixed:K, got {text!r}")


@dataclass(slots=True)
class Trial:
    """A K that is served for a few steps, so that it is known."""

    width: int  # K
    left: int  # steps
    patience: int = 0  # steps that it may take longer, until enough of them were timed
    is_probe: bool = False  # of drafting, by plain decode
    num_timed: int = 0  # steps so far, of this K
    num_drafts: int = 0


class Policy:
    """Chooses K for each step from what it was told of the steps before. Not safe to share by threads."""

    def __init__(
        self, max_draft_tokens: int, prior_rates: Sequence[float] = (), settings: PolicySettings | None = None
    ) -> None:
        """``prior_rates``: conditional acceptance by position as training measured it; 0.5 where unknown."""
        self.settings = settings or PolicySettings()
        self.max_draft_tokens = max_draft_tokens
        # A step whose sequences are all greedy verifies by comparing tokens, any other by their distributions.
        self._times = {sampled: StepTimes() for sampled in (False, True)}
        self.times = self._times[False]  # those of the batch that was last asked about
        self.cut = DraftCut(max_draft_tokens)
        self.mode, self.fixed = AUTO, max_draft_tokens
        self._trial: Trial | None = None
        self.new_head(prior_rates)

    def new_head(self, prior_rates: Sequence[float]) -> None:
        """Forget what was measured of another head's acceptance; step times stay, for heads of one shape share them."""
        prior = [*prior_rates, *[0.5] * self.max_draft_tokens][: self.max_draft_tokens]
        self.acceptance = AcceptanceModel(prior, self.settings.acceptance_window, self.settings.prior_weight)
        self.chosen = self.max_draft_tokens
        self.reason = "start: not measured yet"
        self._steps_since_change = 0
        self._steps_since_trial = self._num_probes = 0
        self.cut = DraftCut(self.max_draft_tokens, self.cut.prices)
        self._trial = None
        self._has_times = False  # whether any step was timed since the last trial began
        self._probe_steps, self._recheck_steps = self.settings.min_probe_steps, self.settings.min_recheck_steps
        self._num_steps = 0
        self._untimed: dict[tuple[bool, int, int], tuple[int, int]] = {}  # next trial's step and interval, see _unknown

    def calibrated(self) -> None:
        """All steps so far were made up: of their times the shares count, not the level."""
        for times in self._times.values():
            times.were_others()

    def times_as_json(self) -> dict[str, Any]:
        """What is known of step times, for ``restore_times``."""
        times = {"greedy": self._times[False].as_json(), "sampled": self._times[True].as_json()}
        return {**times, "prices": self.cut.prices}

    def restore_times(self, tree: Mapping[str, Any]) -> None:
        """Go on from what a server like this one knew; errors as of ``StepTimes.restore``."""
        greedy, sampled = StepTimes(), StepTimes()
        greedy.restore(tree["greedy"])
        sampled.restore(tree["sampled"])
        prices = {int(size): float(price) for size, price in tree["prices"].items()}
        self._times = {False: greedy, True: sampled}
        self.times = greedy
        self.cut.prices = prices

    @property
    def timed_batch_sizes(self) -> list[int]:
        """Powers of two, in two turns of a calibration at least: after a single one two K are known to 10 %."""
        known = (times.timed_sizes(self.max_draft_tokens, self._two_turns) for times in self._times.values())
        return sorted(set().union(*known))

    @property
    def _two_turns(self) -> int:
        """Times of one K in two turns of a calibration."""
        return 2 * ((self.settings.trial_steps - 1) // self.settings.steps_per_time)

    def set_mode(self, mode: str, width: int | None = None) -> None:
        """``auto``, ``off``, or ``fixed`` with its K.

        Raises:
            ValueError: more draft tokens than the head has.
        """
        if mode == FIXED and not 0 <= (width if width is not None else -1) <= self.max_draft_tokens:
            raise ValueError(f"fixed:K takes K from 0 to {self.max_draft_tokens} with this head, got {width}")
        self.mode, self.fixed = mode, self.max_draft_tokens if width is None else width
        self._trial = None

    @property
    def width(self) -> int:
        """K that is meant to be served; trials and probes leave it for a few steps."""
        return {OFF: 0, FIXED: self.fixed}.get(self.mode, self.chosen)

    def observe_drafts(self, drafts: Mapping[tuple[int, int], int]) -> None:
        """A step's verifications: of so many draft tokens, so many accepted -> of how many sequences."""
        if self._trial is not None:
            self._trial.num_drafts += sum(drafts.values())
        self.acceptance.observe(drafts)

    def observe_step(
        self, batch: int, num_draft_tokens: int, seconds: float, sampled: bool = False, num_cut: float = 0.0
    ) -> None:
        """A step that only decoded ``batch`` sequences, each with ``num_draft_tokens`` verified and drafted again.

        ``sampled``: some of them are not greedy. ``num_cut``: so many of a sequence's draft tokens, in the mean, were
        not verified; the step counts as what it would have taken with them.
        """
        self._has_times = True
        if self._trial is not None:
            self._trial.num_timed += self._trial.width == num_draft_tokens
        times = self._times[sampled]
        if num_cut:
            seconds += self.cut.saved(bucket(batch), num_cut, sampled) * (times.estimate(batch, 0) or 0.0)
        times.observe(batch, num_draft_tokens, seconds)

    def threshold(self, batch: int) -> float | None:
        """Probability of acceptance below which a draft token is not verified in a step of ``batch`` sequences; None:
        all are.

        The price it follows from is set once, by the first steps of this size, of which nothing was cut.
        """
        if self.mode != AUTO:
            return None
        size = bucket(batch)
        for times in (self.times, *self._times.values()):
            if size not in self.cut.prices and size in times.timed_sizes(self.max_draft_tokens, self._two_turns):
                seconds = times.estimates(size, self.max_draft_tokens)
                plain, widest = seconds[0] or 0.0, seconds[-1] or 0.0
                self.cut.prices[size] = (widest - plain) / plain / self.max_draft_tokens
                for kind, each in self._times.items():
                    if self.cut.threshold(size, kind) is not None:
                        each.doubt_drafting(size, CUT_DOUBT)
        return self.cut.threshold(size, self._is_sampled)

    @property
    def _is_sampled(self) -> bool:
        """The batch that was last asked about."""
        return self.times is self._times[True]

    def choose(self, batch: int, sampled: bool = False, is_calibration: bool = False) -> int:
        """K for the next step at this batch size; called once a step.

        ``is_calibration``: nobody waits for this batch, so every K is timed, in turn.
        """
        self.times = self._times[sampled]
        if self.mode == OFF:
            return 0
        if self.mode == FIXED:
            return self.fixed
        self._num_steps += 1
        self._steps_since_change += 1
        self._steps_since_trial += 1
        if is_calibration:
            turn = self._num_steps // self.settings.trial_steps
            return self.max_draft_tokens - turn % (1 + self.max_draft_tokens)
        if (trial := self._trial) is not None:
            if not self._is_over(trial) and not self._is_hopeless(batch, trial):
                trial.left -= 1
                return trial.width
            self._trial = None
            self._decide(batch, self._goodputs(batch), trial)
            if trial.is_probe and trial.width == 1 < self.max_draft_tokens and self.chosen:
                return self._time_again(batch, self.max_draft_tokens)
            return self.chosen
        unknown = self._unknown(batch)
        if unknown is not None:
            trial = Trial(unknown, self.settings.trial_steps)
            return self._try(batch, trial, f"timing K={unknown} at batch {bucket(batch)}")
        if self._num_steps % self.settings.look_steps:
            return self.chosen
        goodputs = self._goodputs(batch)
        if self._steps_since_change >= self.settings.dwell_steps:
            self._decide(batch, goodputs)
        if self.chosen == 0 and self._steps_since_trial >= self._probe_steps:
            self.acceptance.forget(self.settings.probe_memory)
            self.cut.forget(self.settings.probe_memory)
            probe = Trial(self._width_of_probe(), self._steps_of_probe(batch), is_probe=True)
            return self._try(batch, probe, "probing whether speculation pays again")
        if self.chosen > 0:
            return self._recheck(batch, goodputs)
        return self.chosen

    def _recheck(self, batch: int, goodputs: Sequence[float | None]) -> int:
        """The served K, or another that it is time to time again."""
        waited, width = self._steps_since_trial, self.chosen
        hopes = self._hoped_for(batch, goodputs) if waited >= self._recheck_steps else {}
        if hopes:
            width = max(hopes, key=lambda k: hopes[k])
        if width != self.chosen and waited >= self._affordable_recheck(goodputs[self.chosen], goodputs[width]):
            if hopes[width] <= (goodputs[self.chosen] or 0.0):
                self._recheck_steps = min(2 * self._recheck_steps, self.settings.max_recheck_steps)
        else:
            if waited < self.settings.dwell_steps:
                return self.chosen
            moved = [self.times.moved(batch, k) for k in range(self.max_draft_tokens + 1)]
            if max(moved) <= self.settings.max_moved:
                return self.chosen
            width = moved.index(max(moved))
        return self._time_again(batch, width)

    def _time_again(self, batch: int, width: int) -> int:
        """A short trial of a K that is known; it waits for times, unless none came since the last trial."""
        patience = self.settings.trial_steps if self._has_times else 0
        trial = Trial(width, self.settings.recheck_trial_steps, patience)
        return self._try(batch, trial, f"timing K={width} again")

    def _width_of_probe(self) -> int:
        """One token, which is cheap and tells whether drafts are accepted at all; at times the widest, for the rest."""
        self._num_probes += 1
        return 1 if self._num_probes % self.settings.probes_of_all else self.max_draft_tokens

    def _affordable_recheck(self, now: float | None, then: float | None) -> int:
        """Steps of which a trial of a K costs ``recheck_share``, by what is known of both; at most the longest."""
        lost = 1 - then / now if now and then else 0.0  # of a step
        steps = math.ceil(self.settings.recheck_trial_steps * max(0.0, lost) / self.settings.recheck_share)
        return min(steps, self.settings.max_recheck_steps)

    def _goodputs(self, batch: int) -> list[float | None]:
        """Expected tokens per second of one sequence for each K; None while a step's time is unknown everywhere."""
        size = self.times.nearest(batch, self.max_draft_tokens)
        seconds = self._seconds(size)
        return [self.acceptance.expected_tokens(k) / each if each else None for k, each in enumerate(seconds)]

    def _seconds(self, batch: int) -> list[float | None]:
        """Of a step of each K, by what is kept of its drafts and what plain decode gains once it lasts; None where that
        is unknown."""
        seconds = self.times.estimates(batch, self.max_draft_tokens)
        plain, size = seconds[0] or 0.0, bucket(batch)
        saved = [plain * self.cut.saved(size, k - self.cut.kept(k), self._is_sampled) for k in range(len(seconds))]
        pairs = zip(seconds, saved, strict=True)
        found = [each if not each or not less else max(each - less, plain) for each, less in pairs]
        return [found[0] and found[0] * (1 - self.settings.rest), *found[1:]]

    def _hoped_for(self, batch: int, goodputs: Sequence[float | None]) -> dict[int, float]:
        """Each other K's goodput, were it as good as it may be by what is known of it."""

        def hoped(width: int, goodput: float | None) -> float:
            of_time = self.times.uncertainty(batch, width, self.chosen)
            of_tokens = self.acceptance.uncertainty(width, self.chosen)
            return (goodput or 0.0) * math.exp(self.settings.hope * math.hypot(of_time, of_tokens))

        return {k: hoped(k, value) for k, value in enumerate(goodputs) if k != self.chosen}

    def _is_over(self, trial: Trial) -> bool:
        """Whether it has told enough. Steps that also read a prompt tell no time."""
        is_timed = trial.num_timed >= self.settings.trial_times
        return trial.left <= 1 and (is_timed or trial.left <= 1 - trial.patience)

    def _is_hopeless(self, batch: int, trial: Trial) -> bool:
        """Whether plain decode would win even if a few more drafts had been accepted than were."""
        times = self._seconds(batch)[: trial.width + 1]
        known = [(k, seconds) for k, seconds in enumerate(times) if seconds is not None]
        if trial.width == 0 or len(known) <= trial.width or trial.num_drafts < self.settings.hopeless_drafts:
            return False
        if not trial.num_timed:  # its time may be what was wrong
            return False
        doubt = self.settings.benefit_of_doubt
        goodputs = [self.acceptance.expected_tokens(k, doubt if k else 0.0) / seconds for k, seconds in known]
        return max(goodputs[1:]) < goodputs[0]

    def _steps_of_probe(self, batch: int) -> int:
        """The first only drafts."""
        return 1 + self.settings.lag_steps + math.ceil(self.settings.probe_drafts / batch)

    def _steps_between_probes(self, batch: int, width: int, num_steps: int) -> int:
        """Plain steps of which a probe of ``num_steps`` costs ``probe_share``."""
        size = self.times.nearest(batch, self.max_draft_tokens)
        seconds = self._seconds(size)
        plain, drafting = seconds[0], seconds[width]
        if plain is None or drafting is None:
            return self.settings.max_probe_steps
        lost = drafting / plain - self.acceptance.expected_tokens(width)  # of a step
        steps = math.ceil(num_steps * lost / self.settings.probe_share)
        return min(max(steps, self.settings.min_probe_steps), self.settings.max_probe_steps)

    def _unknown(self, batch: int) -> int | None:
        """K to time at this batch size. The ends of the range must be known; between them a line will do, for a while.

        A batch of sampled sequences takes much the time of a greedy one: the first of its size starts from what is
        known of the other kind. Where no step is of use (one that also reads a prompt is not) trials come further and
        further apart.
        """
        for width in (self.max_draft_tokens, 0):
            if self.times.num_observed(batch, width) < 2:
                self.times.borrow(self._times[self.times is self._times[False]], batch, self.max_draft_tokens)
            if self.times.num_observed(batch, width) >= 2:
                continue
            key = self._is_sampled, bucket(batch), width
            next_step, interval = self._untimed.get(key, (0, self.settings.min_probe_steps))
            if self._num_steps >= next_step:
                later = self._num_steps + interval, min(2 * interval, self.settings.max_probe_steps)
                self._untimed[key] = later
                return width
        return None

    def _try(self, batch: int, trial: Trial, reason: str) -> int:
        if self.times.moved(batch, trial.width) > self.settings.max_moved:
            self.times.doubt(batch, trial.width)
        self._trial, self._has_times = trial, False
        self._steps_since_trial = 0
        self.reason = reason
        return trial.width

    def _decide(self, batch: int, goodputs: Sequence[float | None], trial: Trial | None = None) -> None:
        """Change to the best K if it is better by the margin. ``trial``: one that has just ended."""
        known = {k: value for k, value in enumerate(goodputs) if value is not None}
        if not known:
            return
        before, now = self.chosen, known.get(self.chosen)
        best = max(known, key=lambda k: known[k])
        is_better = best != before and (now is None or known[best] > now * (1 + self.settings.margin))
        if is_better:
            self.chosen = best
            self._steps_since_change = self._steps_since_trial = 0
            self._probe_steps, self._recheck_steps = self.settings.min_probe_steps, self.settings.min_recheck_steps
        elif trial is not None and trial.is_probe:
            affordable = self._steps_between_probes(batch, trial.width, self._steps_since_trial)
            self._probe_steps = min(2 * self._probe_steps, affordable)
        others = {k: value for k, value in known.items() if k != before}
        other = before if is_better else max(others, key=lambda k: others[k], default=None)
        if (is_better or trial) and other is not None:
            than = f"{known[other]:.1f}" if other in known else "is not timed"
            self.reason = f"K={self.chosen} gives {known[self.chosen]:.1f} tokens/s a sequence, K={other} {than}"
