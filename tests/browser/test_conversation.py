"""Two tabs talk at once while their server is killed and started again."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from agent_state import StatePersistenceManager
from agent_state.sessions import SessionManager
from tests.browser.conftest import ROOT, RUNTIME, Dashboard, looking
from tests.web.processes import serving

pytestmark = pytest.mark.asyncio(loop_scope="session")  # one browser for all
expect.set_options(timeout=60_000)

EACH = 12


async def _say(page: Page, name: str, first: int, last: int) -> None:
    for number in range(first, last):
        await page.get_by_label("Message", exact=True).fill(f"{name} {number}")
        await page.keyboard.press("Enter")


async def _said(page: Page) -> list[str]:
    texts: list[str] = await page.locator(".talk li:not(.outgoing) .text").all_inner_texts()
    return texts


async def test_every_message_is_there_once(
    browser: Browser, filled: tuple[Path, str], tmp_path: Path
) -> None:
    state = shutil.copytree(filled[0], tmp_path / "state")
    session = filled[1]
    place = f"#/sessions/{session}/guide_agent"
    async with looking(browser, state, session, *RUNTIME) as dashboard:
        tabs = [await dashboard.open(place) for _ in range(2)]
        for tab in tabs:
            await expect(tab.get_by_text("The minutes of Tuesday.")).to_be_visible()
        await asyncio.gather(*(_say(tab, f"tab{i}", 0, EACH // 2) for i, tab in enumerate(tabs)))
        dashboard.server.kill()
        await asyncio.gather(*(_say(tab, f"tab{i}", EACH // 2, EACH) for i, tab in enumerate(tabs)))
        for tab in tabs:
            await expect(tab.get_by_text("no connection")).to_be_visible()
        port = dashboard.address.rpartition(":")[2]
        async with serving(state, "--port", port, *RUNTIME, cwd=ROOT):
            await tabs[1].reload()
            for tab in tabs:
                await expect(tab.locator(".outgoing")).to_have_count(0)
                await expect(tab.get_by_text("live", exact=True)).to_be_visible()
                await expect(tab.locator(".talk li")).to_have_count(3 + 2 * EACH)
            shown = [await _said(tab) for tab in tabs]
    async with StatePersistenceManager(state) as manager:
        page = await SessionManager(manager).conversations.page(session, "guide_agent", limit=100)
    stored = [str(message.content) for message in page.messages]

    assert shown == [stored, stored]
    for i in range(2):
        mine = [content for content in stored if content.startswith(f"tab{i} ")]
        assert mine == [f"tab{i} {number}" for number in range(EACH)]


async def test_a_message_that_is_refused_says_so_and_can_be_dropped(dashboard: Dashboard) -> None:
    page = await dashboard.open(f"#/sessions/{dashboard.session}/guide_agent")
    await expect(page.get_by_text("The minutes of Tuesday.")).to_be_visible()
    path = f"{dashboard.address}/api/global/session/{dashboard.session}"
    assert (await page.request.delete(path)).status == 204
    await page.get_by_label("Message", exact=True).fill("too late")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_text("refused")).to_be_visible()
    await page.get_by_role("button", name="Drop").click()
    await expect(page.get_by_text("too late")).to_have_count(0)
