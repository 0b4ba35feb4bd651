"""A worker that throws away what the head put off: a naive fallback (``--worker-extension-cls``)."""

from serving.catch_up import CatchUp

CatchUp._merge = lambda self, waiting, now, metadata: (now, metadata)  # type: ignore[method-assign]


class Worker:
    """Adds nothing: importing this module is what counts."""
