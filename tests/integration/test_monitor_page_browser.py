"""The live page in a real browser: what a person sees, what a press of a button does, and what trouble looks like."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serving.sockets import free_port
from tests.browser import Page, live_page
from tests.fake_engine import FakeEngineClient, make_app, make_status, plain_status

CHARTS = ("goodput", "tau", "k", "positions", "histogram", "spans")
HOSTILE = '<img src=x onerror="document.title=\'pwned\'"><script>document.title="pwned"</script>'


class Server:
    """The monitor on a port of its own; it can go away and come back."""

    def __init__(self, status: dict[str, Any], api_key: list[str] | None = None) -> None:
        self.client = FakeEngineClient(status)
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}/specdec/"
        self._api_key = api_key

    def start(self) -> None:
        app, _ = make_app(self.client, self._api_key)
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def opened(folder: Path, status: dict[str, Any], *flags: str, **options: Any) -> Iterator[tuple[Page, Server]]:
    server = Server(status, **options)
    server.start()
    try:
        with live_page(server.url, folder, "--window-size=1400,1300", *flags) as page:
            page.until("document.querySelector('#mode') && document.querySelector('#mode').innerText !== '–'")
            yield page, server
    finally:
        server.stop()


def test_page_shows_what_the_engine_says_and_follows_it(tmp_path):
    with opened(tmp_path, make_status()) as (page, server):
        tiles = ("#mode", "#reason", "#k", "#tau", "#ratio", "#fallback")
        reason = "K=3 gives 61.4 tokens/s a sequence, K=4 58.9"
        assert [page.text(tile) for tile in tiles] == ["Speculating", reason, "3", "2.31", "1.42×", "27 %"]
        assert page.text("#target") == "smollm2-135m" and page.text("#head") == "eagle3"
        assert [page.value(f"document.querySelectorAll('#{chart}-chart svg').length") for chart in CHARTS] == [1] * 6
        assert page.value("document.querySelectorAll('#positions-chart rect').length") == 4
        assert "acceptance at position 1 is 0.41" in page.text("#events") and "44 %" in page.text("#totals")
        assert page.value("document.querySelector('[data-policy=auto]').getAttribute('aria-pressed')") == "true"
        server.client.answer |= {"num_speculative_tokens": 1, "mode": "plain", "alarm": "drift"}
        page.until("document.querySelector('#k').innerText === '1'")
        assert page.text("#mode") == "Plain decode" and "drifted" in page.text("#alarm")


def test_page_takes_nothing_from_elsewhere_and_fits(tmp_path):
    with opened(tmp_path, make_status()) as (page, server):
        page.until("performance.getEntriesByType('resource').length > 2")
        fetched = set(page.value("performance.getEntriesByType('resource').map(entry => entry.name)"))
        assert fetched == {f"{server.url}status"}
        for width in (1400, 900, 390):
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            page.until("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_press_of_a_button_sets_the_policy(tmp_path):
    with opened(tmp_path, make_status()) as (page, server):
        for policy in ("off", "fixed:2", "auto"):
            page.click(f'[data-policy="{policy}"]')
            page.until(f"document.querySelector('[data-policy=\"{policy}\"]').getAttribute('aria-pressed') === 'true'")
            page.until("!document.querySelector('[data-policy=off]').disabled")
            assert server.client.answer["policy"] == policy
        sent = [command["policy"] for command in server.client.commands if command["command"] == "policy"]
        assert sent == ["off", "fixed:2", "auto"]


def test_refused_policy_is_explained_and_a_key_can_be_given(tmp_path):
    with opened(tmp_path, make_status(), api_key=["secret"]) as (page, server):
        page.click('[data-policy="off"]')
        page.until("!document.querySelector('#key-form').hidden")
        assert "API key" in page.text("#control-note") and server.client.answer["policy"] == "auto"
        page.value("document.querySelector('#key').value = 'secret'")
        page.click("#key-form button")
        page.click('[data-policy="off"]')
        page.until("document.querySelector('#key-form').hidden")
        assert server.client.answer["policy"] == "off"


def test_server_that_goes_away_is_said_so_and_found_again(tmp_path):
    with opened(tmp_path, make_status()) as (page, server):
        server.stop()
        page.until("!document.querySelector('#lost').hidden")
        assert "No answer from the server" in page.text("#lost") and "connection fails" in page.text("#lost")
        assert page.text("#tau") == "2.31" and page.value("document.querySelector('[data-policy=off]').disabled")
        server.client.answer["acceptance_length"] = 1.77
        server.start()
        page.until("document.querySelector('#lost').hidden")
        assert page.text("#tau") == "1.77" and not page.value("document.querySelector('[data-policy=off]').disabled")


def test_engine_that_is_dead_is_said_so(tmp_path):
    with opened(tmp_path, make_status()) as (page, server):
        server.client.errored = True
        page.until("!document.querySelector('#lost').hidden")
        assert "the engine is dead" in page.text("#lost")
        page.value("window.fetch = () => Promise.reject(new DOMException('jargon', 'AbortError'))")
        page.until("document.querySelector('#lost').innerText.includes('the connection fails')")


def test_server_without_a_head_shows_why_and_no_buttons(tmp_path):
    with opened(tmp_path, plain_status(reason="the head is damaged", target="t")) as (page, _):
        tiles = ("#mode", "#reason", "#k", "#tau", "#ratio", "#fallback", "#head")
        assert [page.text(tile) for tile in tiles] == [
            "Plain decode",
            "the head is damaged",
            "–",
            "–",
            "–",
            "–",
            "none",
        ]
        assert page.value("document.querySelector('#control').hidden")
        assert (
            "NaN" not in page.text("main") and "null" not in page.text("main") and "undefined" not in page.text("main")
        )


def test_hostile_text_stays_text(tmp_path):
    texts = dict.fromkeys(("mode", "reason", "alarm", "head", "target"), HOSTILE)
    events = [{"at_sec": 1.0, "kind": HOSTILE, "what": HOSTILE}]
    spans = {HOSTILE: {"num_drafts": 1, "num_draft_tokens": 1, "num_accepted_tokens": 1, "acceptance_length": 2.0}}
    status = make_status(**texts, events=events, by_span=spans, k_histogram={HOSTILE: 3})
    with opened(tmp_path, status) as (page, _):
        page.until("performance.getEntriesByType('resource').length > 1")
        assert page.value("document.querySelectorAll('main img, main script').length") == 0
        assert page.value("document.title") != "pwned" and HOSTILE in page.value("document.title")
        for place in ("#mode", "#reason", "#alarm", "#head", "#target", "#events .what"):
            assert HOSTILE in page.text(place)
        assert page.value(f"document.querySelector('#spans-chart').textContent.includes({json.dumps(HOSTILE)})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_legible_in_light_and_dark(tmp_path, scheme):
    """Contrast of text on its panel by WCAG's formula, at least 4.5."""
    with opened(tmp_path, make_status(alarm="drift")) as (page, _):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        panel = page.value("getComputedStyle(document.querySelector('.tile')).backgroundColor")
        assert (luminance(panel) > 0.5) == (scheme == "light")
        for place in ("#mode", "#reason", "#tau", "#tau-note", "h2", "#events time", "footer a"):
            ground = (
                "getComputedStyle(document.body)"
                if place == "footer a"
                else "getComputedStyle(document.querySelector('.tile'))"
            )
            text = page.value(f"getComputedStyle(document.querySelector('{place}')).color")
            light, dark = sorted((luminance(text), luminance(page.value(f"{ground}.backgroundColor"))), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, place


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
