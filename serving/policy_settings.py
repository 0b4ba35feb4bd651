"""The constants by which the policy looks, tries and changes. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySettings:
    """The controller's constants. Steps are engine steps."""

    margin: float = 0.015  # a change must promise this much more goodput
    rest: float = 0.015  # of a plain step, that is saved once plain decode lasts and no step's time tells: the head
    # rests, of answers and of most of each prompt (``experiments/LOG.md``)
    look_steps: int = 4  # between two looks at what each K promises: they take longer than all else in a step
    dwell_steps: int = 16  # at least between two changes
    trial_steps: int = 6  # of a K whose time at this batch size is unknown
    recheck_trial_steps: int = 3  # of one that is known: often and short, for six in a row meet one moment's machine;
    trial_times: int = 2  # but until so many steps were timed, for up to trial_steps more
    probe_drafts: int = 6  # of a probe, from all sequences of the batch together
    probe_memory: float = 4.0  # drafts that the past counts for in a probe
    probe_share: float = 0.005  # of the time, that probes which don't pay may cost
    probes_of_all: int = 8  # one of so many drafts all tokens, the others a single one
    min_probe_steps: int = 32  # from a change to plain decode, or a probe, to the next probe: at least,
    max_probe_steps: int = 4096  # and at most
    min_recheck_steps: int = 4  # while speculating, from a change to the next time that another K is timed: at least,
    max_recheck_steps: int = 256  # and at most
    recheck_share: float = 0.01  # of the time, that it may cost
    hope: float = 1.5  # standard deviations by which what is known of another K may be too bad
    acceptance_window: float = 1024.0  # drafts that count, of each position, while the text stays as it is
    prior_weight: float = 6.0  # drafts that the head's own figures are worth at the start
    max_moved: float = 2.0  # a time since which the machine's speed changed by more is measured again, be it early
    hopeless_drafts: int = 4  # after so many a probe may end early,
    benefit_of_doubt: float = 2.0  # when even so many more acceptances would not make it pay
    steps_per_time: int = 1  # whose time is taken together: what ``observe_step`` is told is their mean
    lag_steps: int = 0  # that are scheduled before a step's outcome is known


# An engine that schedules a step while the one before it runs books two in one go when it is late: of single steps some
# look several times as fast as any is. Where engines do so, on a GPU, steps are short, so trials may have more of them.
ASYNCHRONOUS = PolicySettings(
    steps_per_time=8, lag_steps=1, dwell_steps=48, trial_steps=20, recheck_trial_steps=12, trial_times=1,
    min_probe_steps=256, max_probe_steps=16_384, min_recheck_steps=128, max_recheck_steps=1024,
)  # fmt: skip
