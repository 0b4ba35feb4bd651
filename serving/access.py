"""Who may use the server: its API key, handed on through the environment, and a warning where anyone may."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

from serving.flags import ServerFlags
from specdec.config import ServeConfig

KEY_VARIABLE = "VLLM_API_KEY"


def key_environment(serve: ServeConfig, user: ServerFlags) -> dict[str, str]:
    """The key in ``serve.api_key_file`` as vLLM's environment variable; a flag after ``--`` wins.

    Raises:
        ValueError: the file can't be read or is empty.
    """
    if serve.api_key_file is None or "--api-key" in user:
        return {}
    try:
        key = Path(serve.api_key_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read api_key_file {serve.api_key_file}: {error}") from error
    if not key:
        raise ValueError(f"api_key_file {serve.api_key_file} is empty: write the key into it")
    return {KEY_VARIABLE: key}


def open_server_warning(host: str, user: ServerFlags, environ: Mapping[str, str]) -> str | None:
    """What to say when the server listens beyond this machine and asks for no key; None otherwise."""
    if _is_loopback(host) or "--api-key" in user or environ.get(KEY_VARIABLE):
        return None
    return (
        f"the server listens on {host or 'every address'} without an API key: whoever reaches it may use it. "
        f"Set {KEY_VARIABLE} or serve.api_key_file, or listen on 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
