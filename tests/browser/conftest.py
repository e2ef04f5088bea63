"""Debian's Chromium, driven by Playwright, and a server in a process of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from tests.browser.sample import fill
from tests.web.processes import serving

ROOT = Path(__file__).parents[2]
RUNTIME = ("--runtime", "tests.browser.sample:make")
WAIT_MS = 60_000
"""A limit for waits, generous since the machine may be busy."""


@dataclass(slots=True)
class Dashboard:
    """A server of a filled directory, and a browser that looks at it."""

    address: str
    state: Path
    context: BrowserContext
    session: str
    server: asyncio.subprocess.Process
    errors: list[str] = field(default_factory=list)
    """What the pages complained about: violations of the policy, and errors of scripts."""

    async def open(self, place: str = "#/") -> Page:
        """A new tab at a place."""
        page = await self.context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: self.errors.append(f"{place}: {error}"))
        page.on("console", lambda message: self.look(message.type, message.text))
        await page.goto(f"{self.address}/{place}")
        await page.locator("h1").wait_for()
        return page

    def look(self, kind: str, text: str) -> None:
        """Keep what a page complained about."""
        # A request that is refused is an error of the browser's own, and no fault of the page.
        if kind == "error" and not text.startswith("Failed to load resource"):
            self.errors.append(text)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is missing: `.ci/install chromium`"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A filled directory to copy, and the id of its session."""
    state = tmp_path_factory.mktemp("filled") / "state"
    return state, await fill(state)


@asynccontextmanager
async def looking(
    browser: Browser, state: Path, session: str, *options: str
) -> AsyncIterator[Dashboard]:
    """A server of the directory and a browser; a complaint of a page is an error in the end."""
    async with serving(state, *options, cwd=ROOT) as (address, server):
        context = await browser.new_context()
        dashboard = Dashboard(address, state, context, session, server)
        yield dashboard
        await context.close()
    assert dashboard.errors == []


@pytest_asyncio.fixture(loop_scope="session")
async def dashboard(
    browser: Browser, filled: tuple[Path, str], tmp_path: Path
) -> AsyncIterator[Dashboard]:
    state = shutil.copytree(filled[0], tmp_path / "state")
    async with looking(browser, state, filled[1], *RUNTIME) as dashboard:
        yield dashboard
