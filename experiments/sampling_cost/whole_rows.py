"""A worker that verifies sampled drafts as vLLM does, by whole rows (``--worker-extension-cls``)."""

import serving.candidates

serving.candidates.is_top_p_alone = lambda sampling_metadata: False


class Worker:
    """Adds nothing: importing this module is what counts."""
