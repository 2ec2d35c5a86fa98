"""A headless Chromium for tests of the dashboard; without one, tests are skipped with the reason.

Driven by selenium, which works through the browser's debugger and so under any content policy. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.limits import PATIENCE_S

T = TypeVar("T")

NUM_STARTS = 5

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


class Browser:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to a page. Ports differ from server to server, so nothing is known of earlier ones."""
        self.driver.get(url)

    def leave(self) -> None:
        """Go to an empty page, which asks no server for anything."""
        self.driver.get("about:blank")

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function body."""
        return self.driver.execute_script(script, *arguments)

    def one(self, selector: str) -> WebElement:
        """The one element that a selector means."""
        (element,) = self.all(selector)
        return element

    def all(self, selector: str) -> list[WebElement]:
        """Every element that a selector means."""
        return list(self.driver.find_elements("css selector", selector))

    def text(self, selector: str) -> str:
        """Its whole text, visible or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def wait(self, condition: Callable[[], T]) -> T:
        """The first true value of a condition; elements that a redraw took away count as not yet."""
        waiting = WebDriverWait(self.driver, PATIENCE_S, poll_frequency=0.05)
        return waiting.until(lambda _: condition(), "it did not happen")

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        """Show pages as on a screen of this size in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """As if the user preferred "dark" or "light"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the browser logged since the last call: failed loads, policy violations, errors of scripts."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def _start(options: webdriver.ChromeOptions, driver: str) -> webdriver.Chrome:
    """Again where it fails: selenium and chromedriver give up after a minute, which a busy machine may need."""
    for _ in range(NUM_STARTS - 1):
        with suppress(WebDriverException):
            return webdriver.Chrome(options=options, service=Service(driver))
    return webdriver.Chrome(options=options, service=Service(driver))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with a profile folder of its own, for a `with` statement."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"no {missing} here; on Debian and Ubuntu: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = _start(options, driver)
    try:
        started.set_page_load_timeout(PATIENCE_S)
        started.set_script_timeout(PATIENCE_S)
        yield Browser(started)
    finally:
        started.quit()
