"""A real browser for tests: Chromium without a window, and without a way out."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def found_by(url: str, folder: Path, flags: tuple[str, ...] = (), budget_ms: int = 10_000) -> Any:
    """Open ``url`` and give the JSON that its script wrote into ``<pre id="found">``.

    ``folder`` becomes the browser's home; ``budget_ms`` is the page's own time, which runs fast while it only waits.
    Skips the test where there is no browser.
    """
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={folder / 'profile'}",
        "--disable-background-networking", f"--virtual-time-budget={budget_ms}", *flags, url,
    ]  # fmt: skip
    # A bad proxy: what tried to reach out would fail, even where there is a network.
    environment = os.environ | {
        "HOME": str(folder),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment).stdout
    written = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert written and written[1], dom[:2000]
    return json.loads(html.unescape(written[1]))
