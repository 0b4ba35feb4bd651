"""A worker as vLLM has it: at K = 0 the head's forward runs every step (``--worker-extension-cls``)."""

import serving.resting_speculator

serving.resting_speculator._is_understood = lambda speculator: False


class Worker:
    """Adds nothing: importing this module is what counts."""
