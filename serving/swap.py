"""``specdec swap``: asks a running server to let another head draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

TIMEOUT_SEC = 330.0  # the server's own, and a little
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def request_swap(url: str, head_dir: Path, api_key: str | None) -> dict[str, Any]:
    """``POST /specdec/head`` at the server at ``url``; ``head_dir`` is a directory on that server's machine.

    Returns: ``head``, ``head_dir`` and ``swap`` of its status.

    Raises:
        ValueError: no such server, or the server's own reason for keeping its head.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    body = {"path": str(head_dir.resolve())}
    try:
        trusts_environment = httpx.URL(base).host not in LOOPBACK  # no proxy leads to this machine
        with httpx.Client(headers=headers, timeout=TIMEOUT_SEC, trust_env=trusts_environment) as client:
            response = client.post(f"{base}/specdec/head", json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(
            f"cannot reach {url} ({type(error).__name__}: {error}): is `specdec serve` running?"
        ) from error
    if response.status_code == 200:
        return response.json()
    if response.status_code in (404, 405):
        raise ValueError(f"{url} is no server of `specdec serve` that can swap heads")
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, TypeError, KeyError):
        reason = f"{url} answered {response.status_code}: {response.text[:300]}"
    raise ValueError(reason)
