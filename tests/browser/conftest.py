"""Debian's Chromium, driven by Playwright, and a server in a process of its own."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from tests.browser.sample import fill
from tests.web.processes import serving

ROOT = Path(__file__).parents[2]
WAIT_MS = 60_000
"""A limit for waits, generous since the machine may be busy."""


@dataclass(slots=True)
class Dashboard:
    """A server of a filled directory, and a browser that looks at it."""

    address: str
    state: Path
    context: BrowserContext
    session: str = ""
    errors: list[str] = field(default_factory=list)
    """What the pages complained about: violations of the policy, and errors of scripts."""

    async def open(self, place: str = "#/") -> Page:
        """A new tab at a place."""
        page = await self.context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.errors.append(f"{place}: {error}"))
        page.on("console", lambda message: self._look(message.type, message.text))
        await page.goto(f"{self.address}/{place}")
        await page.locator("h1").wait_for()
        return page

    def _look(self, kind: str, text: str) -> None:
        # A request that is refused is an error of the browser's own, and no fault of the page.
        if kind == "error" and not text.startswith("Failed to load resource"):
            self.errors.append(text)


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium")
    assert found, "chromium is missing: `.ci/install chromium`"
    return found


@pytest.fixture
async def browser(chromium: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


@pytest.fixture
async def dashboard(browser: Browser, tmp_path: Path) -> AsyncIterator[Dashboard]:
    state = tmp_path / "state"
    session = await fill(state)
    async with serving(state, "--runtime", "tests.browser.sample:make", cwd=ROOT) as (address, _):
        context = await browser.new_context()
        dashboard = Dashboard(address, state, context, session)
        yield dashboard
        await context.close()
    assert dashboard.errors == []
