"""Pages in a real headless browser: what it complains of, what it asks for, and what the page's own scripts answer."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclasses.dataclass
class Opened:
    """A page that has loaded. `tab` is Playwright's page: keyboard, mouse, screenshot.

    `errors` are uncaught exceptions and console errors; `requests` the addresses that were asked for beside the page
    itself. Both grow while the page is used.
    """

    tab: Any
    errors: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, or of what an arrow function returns."""
        return self.tab.evaluate(script)


@contextlib.contextmanager
def open_page(path: Path, *, dark: bool = False, width: int = 1280, height: int = 900) -> Iterator[Opened]:
    """Opens a file in headless Chromium. Skips the test where there is no Chromium, or no Playwright to drive it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(_NAMES)}: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        # A container has no user namespaces for the sandbox, and the page is our own.
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        opened, address = Opened(tab), Path(path).resolve().as_uri()
        tab.on("console", lambda message: message.type == "error" and opened.errors.append(message.text))
        tab.on("pageerror", lambda error: opened.errors.append(str(error)))
        tab.on("request", lambda request: _asked(opened, request.url, address))
        tab.goto(address, wait_until="load")
        yield opened
        browser.close()


def _asked(opened: Opened, url: str, address: str) -> None:
    if url != address and not url.startswith(("data:", "blob:")):
        opened.requests.append(url)
