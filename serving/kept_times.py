"""What the policy learned of step times, in a file that outlives the server: the next one like it goes on from there.

Step times are a matter of machine, target, head and flags, and two K that differ by a few per cent are told apart only
by thousands of steps. So a start need not begin anew: its first requests are served with K from what was learned, and
only batch sizes of which that is little are timed on made-up requests (``serving.calibration``).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from serving.policy import AUTO, Policy
from specdec.record import hardware, package_versions, text_sha256, write_json_atomic
from specdec.targets import cache_dir

logger = logging.getLogger("vllm.specdec")

SAVE_SEC = 60.0  # between two times that the file is written


def times_path(*facts: str) -> Path:
    """Where servers of this machine and these versions that ``facts`` describe keep what they learn."""
    machine, versions = hardware(), package_versions()
    of_machine = [str(machine[name]) for name in ("cpu", "num_cores", "gpus")]
    of_versions = [f"{name} {version}" for name, version in versions.items()]
    return cache_dir() / "step_times" / f"{text_sha256(*of_machine, *of_versions, *facts)[:20]}.json"


class KeptTimes:
    """A policy's step times and their file; trouble with it costs a line in the log."""

    def __init__(self, policy: Policy, path: Path) -> None:
        """Give the policy what the file holds; there is none yet, or it is of no use: start without."""
        self.policy, self.path = policy, path
        self._saved_sec = 0.0
        try:
            policy.restore_times(json.loads(path.read_text(encoding="utf-8")))
            logger.info("specdec: step times of batch sizes %s are known from %s", policy.timed_batch_sizes, path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                "specdec: %s is not used (%s: %s); it will be written anew", path, type(error).__name__, error
            )

    def save(self, now_sec: float) -> None:
        """Write the file, unless that was less than ``SAVE_SEC`` ago. ``now_sec``: since the start."""
        if now_sec - self._saved_sec >= SAVE_SEC:
            self._saved_sec = now_sec
            self.write()

    def write(self) -> None:
        """Write the file now, unless K is held: such a server would put one K in place of what another learned of
        all."""
        if self.policy.mode != AUTO:
            return
        try:
            write_json_atomic(self.path, self.policy.times_as_json())
        except OSError as error:
            logger.warning("specdec: step times are not kept for the next start: %s", error)
