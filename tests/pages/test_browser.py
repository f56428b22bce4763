"""Pages in a headless Chromium, where one is on the PATH: no errors, nothing wider than the window, both schemes."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mico.comparison import compare
from mico.comparison import sections as compared
from mico.pages import comparison_figures, write_html, write_run_page
from tests.comparison.reports import made as run
from tests.pages.reports import made, score

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
    "--disable-dev-shm-usage",  # which is small in containers
    *("--enable-logging=stderr", "--dump-dom"),
)
WIDTHS = (320, 390, 768, 1280)
LONG = "folder/with_a_very_long_name/" * 8 + "x" * 150
# The page itself runs no script but its own, so another page holds it in frames of several widths and measures it.
WRAPPER = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<script>
const found = [];
const frames = WIDTHS.map((width) => {
  const frame = document.createElement("iframe");
  frame.src = "NAME";
  frame.style = `width: ${width}px; height: 800px; border: 0; display: block`;
  return frame;
});
const measure = (frame) => {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const outside = [...page.querySelectorAll("svg.figure text")].filter((text) => {
    const box = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect();
    return box.left < all.left - 2 || box.right > all.right + 2 || box.bottom > all.bottom + 2;
  });
  const paper = () => view.getComputedStyle(page.body).backgroundColor;
  const before = paper();
  page.getElementById("theme").click();
  found.push({
    width: frame.clientWidth, scroll: root.scrollWidth, paper: before, other: paper(),
    outside: outside.map((text) => text.textContent), hidden: page.querySelectorAll("button[hidden]").length,
    smallest: Math.min(...[...page.querySelectorAll("svg.figure text")].map((t) => t.getBoundingClientRect().height)),
    requests: view.performance.getEntriesByType("resource").map((one) => one.name),
  });
};
let left = frames.length;
for (const frame of frames) {
  frame.onload = () => {
    measure(frame);
    if (!--left) document.getElementById("found").textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


def browse(page: Path, profile: Path, scheme: int) -> list[dict[str, Any]]:
    """What the wrapper measures of a page at every width; scheme 0 asks for dark, 1 for light."""
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(WRAPPER.replace("WIDTHS", str(list(WIDTHS))).replace("NAME", page.name), encoding="utf-8")
    flags = [*FLAGS, f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}"]
    done = subprocess.run([str(CHROMIUM), *flags, wrapper.as_uri()], capture_output=True, text=True, timeout=300)
    if done.returncode:  # no page makes it fail: it has no room, or lacks a right
        pytest.skip(f"Chromium cannot run here: {done.stderr[-300:]}")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[:1000] + done.stderr[-1000:]
    return json.loads(html.unescape(found[1]))


def check(found: list[dict[str, Any]], scheme: int) -> None:
    white, black = "rgb(255, 255, 255)", "rgb(20, 21, 23)"
    papers = (black, white) if scheme == 0 else (white, black)
    assert sorted(one["width"] for one in found) == sorted(WIDTHS)
    for one in found:
        assert one["scroll"] <= one["width"], one
        assert (one["paper"], one["other"]) == papers
        assert not one["outside"] and not one["hidden"] and not one["requests"]
        assert one["smallest"] >= (9 if one["width"] >= 390 else 7)


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_run(tmp_path: Path, scheme: int) -> None:
    report = made(
        40, model=LONG, folder=LONG, command=["mico", "compress", LONG], fallbacks=[dict(layer=LONG, what=LONG)],
        compressed=dict(docs=score(36.0, kl_divergence=0.5, top1_agreement=0.75), wiki=score(5e7)),
    )  # fmt: skip
    write_run_page(tmp_path / "page.html", report)
    check(browse(tmp_path / "page.html", tmp_path / "profile", scheme), scheme)


def test_a_comparison(tmp_path: Path) -> None:
    runs = [
        run("mi", seed, 40 + 100 / groups + seed, grouping=dict(n_groups=groups), folder=f"{LONG}{groups}-{seed}")
        for groups in (5, 10, 20)
        for seed in (0, 1)
    ]
    values = compare(runs)
    write_html(tmp_path / "page.html", "Runs", compared(values), comparison_figures(values), values)
    check(browse(tmp_path / "page.html", tmp_path / "profile", 1), 1)
