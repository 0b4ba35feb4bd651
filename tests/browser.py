"""A real browser for tests: Chromium without a window, and without a way out."""

from __future__ import annotations

import contextlib
import html
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_SEC = 60.0  # a busy machine is slow, not wrong


def _command(folder: Path, *flags: str) -> tuple[list[str], dict[str, str]]:
    """The browser's command line and environment, with ``folder`` as its home; skips the test where there is none."""
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--disable-background-networking", *flags,
    ]  # fmt: skip
    # A bad proxy: what tried to reach out would fail, even where there is a network.
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return command, os.environ | {"HOME": str(folder)} | proxies


def found_by(url: str, folder: Path, *flags: str) -> Any:
    """Open ``url`` and give the JSON that its script wrote into ``<pre id="found">``."""
    command, environment = _command(folder, "--dump-dom", "--virtual-time-budget=10000", *flags, url)
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment).stdout
    written = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert written and written[1], dom[:2000]
    return json.loads(html.unescape(written[1]))


class Page:
    """A page that lives, driven from outside over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One DevTools command; gives its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE_SEC))
            if answer.get("id") == number:  # the others are events
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script: str) -> Any:
        """What a JavaScript expression is worth in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What a person reads in the first element that ``selector`` finds."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def until(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + PATIENCE_SEC
        while not self.value(script):
            assert time.monotonic() < deadline, f"never true: {script}\n{self.value('document.body.innerText')}"
            time.sleep(0.1)

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of the element, as a person would."""
        place = self.value(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)


@contextlib.contextmanager
def live_page(url: str, folder: Path, *flags: str) -> Iterator[Page]:
    """``url`` opened in a browser of its own."""
    command, environment = _command(folder, "--remote-debugging-port=0", *flags, "about:blank")
    with (folder / "browser.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        with connect(_devtools_url(folder, process), proxy=None, max_size=None) as socket:
            page = Page(socket)
            targets = page.call("Target.getTargets")["targetInfos"]
            target = next(target["targetId"] for target in targets if target["type"] == "page")
            address = f"ws://{socket.request.headers['Host']}/devtools/page/{target}"
        with connect(address, proxy=None, max_size=None) as socket:
            page = Page(socket)
            page.call("Page.bringToFront")  # else it counts as hidden
            page.call("Page.navigate", url=url)
            yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _devtools_url(folder: Path, process: subprocess.Popen) -> str:
    """Where the browser listens, once it has written that down."""
    written = folder / "profile" / "DevToolsActivePort"
    deadline = time.monotonic() + PATIENCE_SEC
    while not written.exists() or len(written.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "browser.log").read_text()
        time.sleep(0.1)
    port, path = written.read_text().splitlines()[:2]
    return f"ws://127.0.0.1:{port}{path}"
