"""A worker that throws away what the head put off: a naive fallback (``--worker-extension-cls``)."""

from serving.keys_only import KeysOnly

KeysOnly.write = lambda self, count=None: self.waiting.clear()  # type: ignore[method-assign]


class Worker:
    """Adds nothing: importing this module is what counts."""
