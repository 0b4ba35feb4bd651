"""A stop on request, apart from the torch code so that the command line can name it cheaply."""


class Interrupted(Exception):  # noqa: N818 - a state, not an error
    """Training stopped on Ctrl-C or SIGTERM; the checkpoint is on disk."""
