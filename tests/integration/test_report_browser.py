"""The report in a real browser, offline: every plot loads, nothing is fetched, nothing sticks out."""

from __future__ import annotations

import pytest

from specdec.evaluation.compare import render_comparison
from specdec.evaluation.report import render_report
from tests.browser import found_by
from tests.result_extras import rich_result
from tests.result_tree import make_result

WIDTHS = {"report.html": 1200, "phone.html": 390, "comparison.html": 1500}

# The pages run no script, so a page around them looks inside and writes down what it finds.
HARNESS = """<!doctype html><body><pre id="found"></pre>{frames}<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, root = page.documentElement;
    found[frame.name] = {{
      images: [...page.images].map(image => [image.complete, image.naturalWidth, image.getBoundingClientRect().width]),
      alts: [...page.images].map(image => image.alt),
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      scripts: page.scripts.length,
      overflow: root.scrollWidth - root.clientWidth,
      height: root.scrollHeight,
      dead_links: [...page.querySelectorAll("a")].filter(a => !page.querySelector(a.getAttribute("href"))).length,
    }};
  }}
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script></body>"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the browser saw, by page."""
    folder = tmp_path_factory.mktemp("pages")
    rich = render_report(rich_result())
    pages = {
        "report.html": rich,
        "phone.html": rich,
        "comparison.html": render_comparison([("a", make_result()), ("b", make_result(gain=0.8))]),
    }
    for name, page in pages.items():
        (folder / name).write_text(page, encoding="utf-8")
    frames = "".join(
        f'<iframe name="{n}" src="{n}" width="{width}" height="900"></iframe>' for n, width in WIDTHS.items()
    )
    (folder / "harness.html").write_text(HARNESS.format(frames=frames), encoding="utf-8")
    flags = ["--allow-file-access-from-files", "--window-size=1600,3000"]
    return found_by((folder / "harness.html").as_uri(), folder, *flags)


@pytest.mark.parametrize(("name", "num_images"), [("report.html", 13), ("phone.html", 13), ("comparison.html", 2)])
def test_every_plot_loads_and_nothing_is_fetched(found, name, num_images):
    page = found[name]
    assert len(page["images"]) == num_images and all(len(alt) > 20 for alt in page["alts"])
    for complete, natural_width, width in page["images"]:
        assert complete and natural_width > 300 and 250 < width <= WIDTHS[name]
    assert [url for url in page["fetched"] if not url.startswith("data:")] == []
    assert page["scripts"] == 0 and page["dead_links"] == 0 and page["height"] > 1000


@pytest.mark.parametrize("name", WIDTHS)
def test_nothing_sticks_out(found, name):
    assert found[name]["overflow"] == 0
