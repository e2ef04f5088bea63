"""Write the pictures of docs/dashboard.md: ``python -m tests.browser.screenshots``."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from playwright.async_api import Page, ViewportSize, async_playwright

from tests.browser.sample import fill
from tests.web.processes import serving

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
SIZE = ViewportSize(width=1200, height=760)
PHONE = ViewportSize(width=390, height=760)


async def _show(page: Page, address: str, place: str, waits_for: str) -> None:
    await page.goto(f"{address}/{place}")
    await page.get_by_text(waits_for, exact=True).first.wait_for()
    await page.get_by_text("live", exact=True).wait_for()
    await page.locator(".loading").wait_for(state="detached")


def _places(session: str) -> dict[str, tuple[str, str]]:
    """The pages by the names of their pictures: the place, and the text that is there at last."""
    return {
        "overview": ("#/", "Queues"),
        "agents": ("#/agents", "bela"),
        "agent": ("#/agents/ada", "Memory"),
        "tasks": ("#/tasks?status=dead", "fetch"),
        "mail": ("#/mail", "The report"),
        "sessions": ("#/sessions", "ann"),
        "session": (f"#/sessions/{session}", "guide_agent"),
        "conversation": (f"#/sessions/{session}/guide_agent", "The minutes of Tuesday."),
        "journeys": ("#/journeys?user=ann", "active"),
        "recorder": ("#/recorder", "Speakers"),
        "changes": ("#/changes", "Before"),
        "logs": ("#/logs", "Log"),
        "sleepers": ("#/sleepers", "waits for the review"),
        "quarantine": ("#/quarantine", "agents/eve.json"),
        "document": ("#/documents/agents/ada", "Written by"),
    }


async def _show_actions(page: Page, address: str) -> None:
    """What is behind a button or a link of a page."""
    await _show(page, address, "#/tasks?status=dead", "fetch")
    await page.get_by_role("button", name="Run again all").click()
    await page.get_by_role("button", name="Run again 6").wait_for()
    await page.screenshot(path=IMAGES / "again.png")
    await page.get_by_role("button", name="Close").click()
    await page.get_by_role("link", name="fetch").first.click()
    await page.get_by_role("heading", name="Error").wait_for()
    await page.screenshot(path=IMAGES / "task.png", full_page=True)
    await _show(page, address, "#/mail", "The report")
    await page.get_by_role("link", name="The report", exact=True).click()
    await page.get_by_text("The first three", exact=False).wait_for()
    await page.screenshot(path=IMAGES / "message.png")
    await _show(page, address, "#/documents/agents/ada", "Written by")
    await page.get_by_role("button", name="Earlier versions").click()
    await page.get_by_role("heading", name="Earlier versions").wait_for()
    await page.screenshot(path=IMAGES / "history.png", full_page=True)


async def _change(page: Page, address: str) -> None:
    """Something changes while the server runs."""
    await page.request.get(f"{address}/api/changes")
    made = await (await page.request.post(f"{address}/api/journeys/ann", data={})).json()
    said = {"role": "user", "content": "The report is done, at last."}
    journey = f"{address}/api/journeys/ann/{made['session_id']}"
    for path, body in (
        (f"{journey}/messages", said),
        (f"{address}/api/agents/bela/tasks", {"name": "summarize", "payload": {"file": "a.txt"}}),
    ):
        assert (await page.request.post(path, data=body)).ok


async def main() -> None:
    """Fill a directory, serve it, and look at each page."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        session = await fill(state)
        options = ("--runtime", "tests.browser.sample:make")
        async with serving(state, *options, cwd=ROOT) as (address, _), async_playwright() as driver:
            browser = await driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = await browser.new_page(viewport=SIZE)
            page.set_default_timeout(120_000)
            await _change(page, address)
            for name, (place, waits_for) in _places(session).items():
                await _show(page, address, place, waits_for)
                await page.screenshot(path=IMAGES / f"{name}.png", full_page=True)
            await _show_actions(page, address)
            dark = await browser.new_page(viewport=PHONE, color_scheme="dark")
            dark.set_default_timeout(120_000)
            await _show(dark, address, "#/", "Queues")
            await dark.screenshot(path=IMAGES / "phone.png")
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
