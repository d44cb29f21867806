"""The page in a real browser: it renders, in light and dark and narrow, and loads nothing."""

import json
import subprocess

import numpy as np
import pytest

from aam.report import write_report

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
    # The browser itself calls home at its start; no name resolves for it here.
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip


@pytest.fixture
def browse(require_tool, tmp_path):
    """Open a page: its DOM, its screenshot and the addresses that the page asked for."""
    chromium = require_tool("chromium")

    def open_page(path, width=1200, height=2400, flags=()):
        folder = tmp_path / f"browser-{len(list(tmp_path.glob('browser-*')))}"
        folder.mkdir()
        command = [
            chromium,
            *FLAGS,
            *flags,
            f"--user-data-dir={folder / 'user'}",
            f"--log-net-log={folder / 'net.json'}",
            f"--window-size={width},{height}",
            f"--screenshot={folder / 'page.png'}",
            "--dump-dom",
            path.resolve().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        return done.stdout, _pixels(folder / "page.png"), _asked_for(folder / "net.json")

    return open_page


def _pixels(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def _asked_for(path):
    """Addresses that pages, not the browser itself, asked the network for."""
    events = json.loads(path.read_text())["events"]
    asked = [event.get("params") or {} for event in events]
    return {entry["url"] for entry in asked if entry.get("initiator", "not an origin") == "null"}


def _share(pixels, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels - wanted).max(axis=-1) <= 12).mean())


def test_figures_render_in_the_pages_colours_and_nothing_is_loaded(tmp_path, fabricate, browse):
    dom, pixels, asked = browse(write_report(fabricate.pretraining(tmp_path / "run")))
    for name in ("distances", "placements", "ordination", "curves", "mechanics"):
        start = dom.index(f'<figure id="{name}">')
        assert "<path" in dom[start : dom.index("</figure>", start)]
    assert asked == set()
    assert pixels.shape == (2400, 1200, 3)
    # The first two series' colours come from the page's style: the drawings follow it.
    assert _share(pixels, "#1f6fb2") > 2e-4
    assert _share(pixels, "#cf5a14") > 2e-5
    assert _share(pixels, "#ffffff") > 0.4


def test_dark_mode_and_a_narrow_screen(tmp_path, fabricate, browse):
    path = write_report(fabricate.classification(tmp_path / "run"))
    _, pixels, _ = browse(path, 500, 3000, ["--blink-settings=preferredColorScheme=0"])
    assert _share(pixels, "#1a2026") > 0.4 and _share(pixels, "#ffffff") < 0.01
    assert _share(pixels, "#66b0ee") > 2e-4
    # Nothing sticks out to the right: the last columns are ground and section border only.
    assert pixels[400:, -8:].std(axis=(0, 1)).max() < 6


def test_the_detector_sees_a_page_that_loads_something(tmp_path, browse):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://images.invalid/a.png">')
    assert browse(page, 300, 300)[2] == {"http://images.invalid/a.png"}
