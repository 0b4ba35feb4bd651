"""vLLM's own flags, as a user types them after ``--``: which are set, and to what."""

from __future__ import annotations

ALIASES = {"-sc": "--speculative-config", "-tp": "--tensor-parallel-size", "-n": "--nnodes", "-q": "--quantization"}
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


class ServerFlags:
    """The flags in ``args``, looked up by vLLM's long name, in any spelling that vLLM takes."""

    def __init__(self, args: list[str]) -> None:
        self.args = list(args)
        self._values: dict[str, str | None] = {}
        for i, arg in enumerate(args):
            if not _is_flag(arg):
                continue
            name, equals, text = arg.partition("=")
            following = args[i + 1] if i + 1 < len(args) else "--"
            value = text if equals else following
            self._values[canonical(name)] = None if not equals and following.startswith("--") else value

    def __contains__(self, name: str) -> bool:
        """Whether ``name``, its negation or one key of it (``--name.key``) is set."""
        wanted = canonical(name)
        return any(key == wanted or key.startswith(f"{wanted}.") for key in self._values)

    def get(self, name: str) -> str | None:
        """The flag's text; None when it is not set or stands alone."""
        return self._values.get(canonical(name))

    def get_int(self, name: str) -> int | None:
        """The flag as a number of units (``8k`` is 8000, ``8K`` 8192, as vLLM reads it); None when it isn't one."""
        text = self.get(name)
        if not text:
            return None
        number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1] in _UNITS else (text, 1)
        try:
            return int(float(number) * unit)
        except ValueError:
            return None

    def without(self, *names: str) -> list[str]:
        """The arguments less these flags, keys of them (``--name.key``) included, and their values."""
        unwanted, kept, dropping = {canonical(name) for name in names}, [], False
        for arg in self.args:
            if _is_flag(arg):
                dropping = canonical(arg.partition("=")[0]).partition(".")[0] in unwanted
            kept += [] if dropping else [arg]
        return kept


def _is_flag(arg: str) -> bool:
    return arg.startswith("-") and not arg.lstrip("-")[:1].isdigit()


def canonical(name: str) -> str:
    """One spelling for a flag: long, with dashes, without the ``no-`` of its negation."""
    head, dot, keys = ALIASES.get(name, name).partition(".")
    head = ALIASES.get(head, head)
    if not head.startswith("--"):
        return name
    return "--" + head[2:].replace("_", "-").removeprefix("no-") + dot + keys
