"""Look at the built site in a browser: every page light and dark, narrow and wide, from disk and without a network.

    python docs/tools/browser.py SITE SCREENSHOTS

A page fails where the console complains, something is loaded from elsewhere, an image is missing, a formula or a
drawing's words are too small to read, or the page is wider than its window; the whole, where the search finds nothing.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
SCHEMES = ("light", "dark")
WIDTHS = (390, 1280)
PATIENCE = 120_000
"""Milliseconds, for machines that do other things too."""
SMALLEST = 9
"""Pixels that letters of drawings and formulas are at least high."""
MEASURED = """smallest => {
    const high = node => node.getBoundingClientRect().height
    const shown = node => node.getBoundingClientRect().width > 0
    const found = []
    if (document.scrollingElement.scrollWidth > innerWidth) found.push("is wider than its window")
    for (const image of document.images)
        if (shown(image) && !image.naturalWidth) found.push("lacks " + image.getAttribute("src"))
    for (const text of document.querySelectorAll(".drawing text"))
        if (shown(text) && high(text) < smallest) found.push("draws too small: " + text.textContent)
    for (const formula of document.querySelectorAll(".formula svg"))
        if (shown(formula) && high(formula) < smallest) found.push("shrinks " + formula.getAttribute("aria-label"))
    return found
}"""


def main(site: Path, shots: Path) -> int:
    """Look at all pages; the number of faults is told, and whether there are any is the exit status."""
    pages = sorted(set(site.rglob("*.html")) - {site / "404.html"})  # which servers show
    if not pages:
        raise SystemExit(f"{site} holds no pages; build them by nox -s docs")
    shots.mkdir(parents=True, exist_ok=True)
    views, faults = list(product(pages, SCHEMES, WIDTHS)), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed(), args=list(FLAGS))
        try:
            for path, scheme, width in views:
                name = path.relative_to(site).with_suffix("").as_posix().replace("/", "-")
                shot = shots / f"{name}-{scheme}-{width}.png"
                faults += [f"{shot.stem}: {fault}" for fault in looked_at(browser, path, scheme, width, shot)]
            faults += searched(browser, site / "index.html", shots / "search.png")
        finally:
            browser.close()
    print("\n".join([*faults, f"{len(views)} views of {site}, {len(faults)} faults; screenshots in {shots}"]))
    return bool(faults)


def installed() -> str | None:
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def looked_at(browser: Browser, path: Path, scheme: Any, width: int, shot: Path) -> list[str]:
    """What is wrong with one page in one view, of which a picture is taken."""
    with_faults = opened(browser, path, scheme, width)
    page, faults = next(with_faults)
    faults += page.evaluate(MEASURED, SMALLEST)
    page.screenshot(path=shot, full_page=True)
    with_faults.close()
    return faults


def opened(browser: Browser, path: Path, scheme: Any, width: int) -> Iterator[tuple[Page, list[str]]]:
    """A page with a list of what goes wrong meanwhile."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []
    page.on("console", lambda line: line.type in ("error", "warning") and faults.append(f"console: {line.text}"))
    page.on("pageerror", lambda error: faults.append(f"raises {error}"))
    page.on("request", lambda request: elsewhere(request.url) and faults.append(f"loads {request.url}"))
    page.goto(path.resolve().as_uri(), wait_until="load")
    page.wait_for_timeout(100)
    try:
        yield page, faults
    finally:
        page.close()


def elsewhere(url: str) -> bool:
    """Whether an address is not this site's own."""
    return not url.startswith(("file:", "data:", "blob:"))


def searched(browser: Browser, path: Path, shot: Path) -> list[str]:
    """What is wrong with the search."""
    opening = opened(browser, path, "light", 1280)
    page, faults = next(opening)
    page.click(".md-search__input")
    page.keyboard.type("suffix scan", delay=50)
    try:
        page.wait_for_selector(".md-search-result__item")
    except Error as error:
        faults.append(f"the search finds nothing: {error}")
    page.screenshot(path=shot)
    opening.close()
    return [f"search: {fault}" for fault in faults]


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
