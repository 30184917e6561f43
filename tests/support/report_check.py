"""Check a report in a browser: its script runs, and its sliders redraw it as a page made for their values.

`python tests/support/report_check.py` (`make report-check`) looks for a Chromium and says so if there is none.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnc import compile_attention
from attnc.runtime.pictures.draw import make_drawing
from attnc.runtime.report.page import report_html, write_report
from attnc.runtime.report.point import ReportPoint

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLAYWRIGHT = (
    "chromium-*/chrome-linux*/chrome",
    "chromium_headless_shell-*/chrome-*linux*/*headless*shell",
    "chromium-*/chrome-mac*/Chromium.app/Contents/MacOS/Chromium",
)
SECONDS = 120

LENGTHS, WINDOWS = (8192, 16384, 32768), (512, 1024, 2048)

DRIVER = """
(() => {
  "use strict";
  const body = document.body;
  const faults = [];
  window.addEventListener("error", (event) => faults.push(event.message));
  const table = JSON.parse(document.getElementById("attnc-data").textContent);
  const sliders = [document.getElementById("slide-length"), document.getElementById("slide-value")];
  const move = (at) => sliders.forEach((slider, i) => {
    slider.value = String(at[i]);
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  });
  for (const point of table.points) {
    move(point.at);
    for (const place of document.querySelectorAll("[data-text]")) {
      const name = place.dataset.text;
      if (place.textContent !== point.texts[name]) faults.push(`${name} at ${point.at}: ${place.textContent}`);
    }
  }
  move(GOAL);
  body.dataset.faults = faults.join("; ");
})();
"""


class CheckError(Exception):
    """The report is wrong, or the browser does not answer."""


@dataclass(frozen=True)
class Browser:
    """A Chromium, by its path."""

    path: str

    def dom(self, page: Path, *options: str) -> str:
        """Return the document after its scripts have run. Raise CheckError."""
        with tempfile.TemporaryDirectory(prefix="attnc-browser-", ignore_cleanup_errors=True) as profile:
            # Chromium refuses its sandbox to root; the page is trusted.
            root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            command = [self.path, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}", *root]
            try:
                done = subprocess.run(
                    [*command, *(options or ("--dump-dom",)), page.as_uri()],
                    capture_output=True,
                    text=True,
                    encoding="utf-8",
                    timeout=SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CheckError(f"{self.path}: {error}") from None
        if done.returncode:
            raise CheckError(f"{self.path} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout


def find_browser() -> Browser | None:
    """Find a Chromium on the path, or one that Playwright installed."""
    browser = next(filter(None, map(shutil.which, COMMANDS)), None)
    return Browser(browser) if browser else next(map(Browser, _of_playwright()), None)


def _of_playwright() -> Iterator[str]:
    configured = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    folders = (
        [Path(configured)]
        if configured
        else [Path.home() / cache / "ms-playwright" for cache in (".cache", "Library/Caches")]
    )
    for folder in folders:
        for pattern in PLAYWRIGHT:
            yield from (str(path) for path in sorted(folder.glob(pattern), reverse=True) if os.access(path, os.X_OK))


def grid(lengths: Sequence[int], windows: Sequence[int]) -> list[ReportPoint]:
    """Simulate a sliding window at every length with every window."""
    points = []
    for window in windows:
        attend = compile_attention("sliding_window", window=window)
        points += [ReportPoint(n, window, attend.simulate(n), make_drawing(attend, n, n)) for n in lengths]
    return points


def report_at(points: Sequence[ReportPoint], place: tuple[int, int]) -> str:
    """Return the page that starts at a point, with a comparison."""
    start = next(point for point in points if point.place == place)
    compared = [compile_attention("causal").simulate(LENGTHS[0])]
    return report_html(start.simulation, start.drawing, (), points, compared, parameter="window")


def driven(page: str, goal: Sequence[int]) -> str:
    """Add a script that moves the sliders to every point, and last to `goal`, and allow it in the page's policy."""
    script = DRIVER.replace("GOAL", str(list(goal)))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    return page.replace("</body>", f"<script>{script}</script></body>")


def moving_parts(dom: str) -> dict[str, str]:
    """Return the sections by name, without those that no slider changes."""
    sections = dict(re.findall(r'<section id="(\w+)"[^>]*>(.*?)</section>', dom, re.DOTALL))
    return {name: text for name, text in sections.items() if name not in ("compared", "picture")}


def attribute(dom: str, name: str) -> str | None:
    """Return an attribute of the body after the scripts have run."""
    match = re.search(rf'<body[^>]* data-{name}="([^"]*)"', dom)
    return html.unescape(match[1]) if match else None


def check(browser: Browser, folder: Path) -> str:
    """Check a report in a browser and return a summary. Raise CheckError."""
    points = grid(LENGTHS, WINDOWS)
    start, goal = (LENGTHS[1], WINDOWS[1]), (LENGTHS[2], WINDOWS[0])
    pages = {name: folder / f"{name}.html" for name in ("report", "goal", "driven")}
    text = report_at(points, start)
    write_report(pages["report"], text)
    write_report(pages["goal"], report_at(points, goal))
    write_report(pages["driven"], driven(text, [LENGTHS.index(goal[0]), WINDOWS.index(goal[1])]))
    doms = {name: browser.dom(path) for name, path in pages.items()}
    for name in ("report", "goal"):
        if (attribute(doms[name], "ready"), attribute(doms[name], "redraws")) != ("true", "0"):
            raise CheckError(f"the script of {name}.html did not run")
    faults, redraws = (attribute(doms["driven"], name) for name in ("faults", "redraws"))
    if faults != "":
        raise CheckError(f"the sliders did not redraw the page: {faults or 'the driver did not run'}")
    if redraws is None or int(redraws) < len(points):
        raise CheckError(f"{redraws} redraws of {len(points)} points")
    wanted, actual = moving_parts(doms["goal"]), moving_parts(doms["driven"])
    wrong = [name for name in wanted if actual.get(name) != wanted[name]]
    if wrong or not wanted:
        raise CheckError(
            f"after redrawing, sections differ from a page made for the point: {', '.join(wrong) or 'everything'}"
        )
    if moving_parts(doms["report"]) == actual:
        raise CheckError("the sliders moved, but nothing changed")
    return f"{redraws} redraws over {len(points)} points; {', '.join(wanted)} as drawn there"


def main() -> int:
    """Run the check and print its result; return 0 if there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", help="path of a Chromium (default: search for one)")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the pages and a picture of the first in FOLDER"
    )
    args = parser.parse_args()
    browser = Browser(args.browser) if args.browser else find_browser()
    if browser is None:
        print(f"report-check: no Chromium is installed ({', '.join(COMMANDS)}, Playwright's): nothing was checked")
        return 0
    with tempfile.TemporaryDirectory(prefix="attnc-report-") as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            print(f"report-check: {browser.path}: {check(browser, folder)}")
            if args.keep:
                picture = folder / "report.png"
                browser.dom(
                    folder / "report.html", f"--screenshot={picture}", "--window-size=1240,2400", "--hide-scrollbars"
                )
                print(f"report-check: kept in {folder}")
        except CheckError as error:
            print(f"report-check: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
