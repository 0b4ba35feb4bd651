"""A repository of the Hugging Face hub as a folder on this disk; every way it can fail as one line."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def is_repository_name(name: str) -> bool:
    """Whether ``name`` could be a repository: ``ORG/NAME``, and no path."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def hub_snapshot(what: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of ``name`` in the hub's cache; fetched when it isn't there. ``what`` it is, for the messages.

    Raises:
        ValueError: it is gated, missing or can't be fetched, or the disk is full. The message says what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ValueError(
            f"{what} {name} is gated: accept its licence on its model page, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what} {name} is no directory here and not on the Hugging Face hub (if it is private: `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what} {name} has no revision {revision!r}; its page lists branches and commits") from error
    except Exception as error:  # the hub client raises many kinds of network errors
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise ValueError(
                f"no room to download {what} {name}: free some space or point HF_HOME to another disk"
            ) from error
        raise ValueError(
            f"{what} {name} is not a directory here and could not be fetched ({type(error).__name__}): check the name "
            "and the network, or pass a local directory"
        ) from error
