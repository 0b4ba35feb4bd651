"""A worker as vLLM has it: at K = 0 the head's forward runs every step (``--worker-extension-cls``)."""

import serving.catch_up

serving.catch_up._is_understood = lambda drafter: False


class Worker:
    """Adds nothing: importing this module is what counts."""
