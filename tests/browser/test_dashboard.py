"""The dashboard as people use it: what it shows, what it does to the files, and for whom."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, Route, expect

from agent_state import StatePersistenceManager
from agent_state_integrations.recorder import Recorder
from tests.browser.conftest import RUNTIME, Dashboard, looking
from tests.deadlines import until
from tests.web.client import TOKEN

pytestmark = pytest.mark.asyncio(loop_scope="session")  # one browser for all
expect.set_options(timeout=60_000)

PLACES = (
    "#/",
    "#/agents",
    "#/agents/ada",
    "#/agents/dina",
    "#/tasks?status=dead",
    "#/mail",
    "#/sessions",
    "#/journeys?user=ann",
    "#/recorder",
    "#/changes",
    "#/logs",
    "#/sleepers",
    "#/quarantine",
    "#/access",
    "#/documents/agents/ada",
)


def _documents(state: Path, kind: str) -> list[dict[str, Any]]:
    """The stored documents of a kind, as their files are; one may be removed meanwhile."""
    found = []
    for path in sorted((state / kind).rglob("*.json")):
        with suppress(FileNotFoundError):
            found.append(json.loads(path.read_text()))
    return found


async def _alone(page: Page) -> None:
    """Nothing is on its way any more."""
    await expect(page.locator(".loading")).to_have_count(0)


async def _watched(dashboard: Dashboard, place: str) -> tuple[Page, list[str]]:
    """A new tab at a place once it follows changes, and all that it has asked of the API."""
    page = await dashboard.context.new_page()
    await page.clock.install()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(dashboard.address)))
    await page.goto(f"{dashboard.address}/{place}")
    await expect(page.get_by_text("live", exact=True)).to_be_visible()
    await _alone(page)
    await page.clock.fast_forward(60_000)  # what it has put off is asked for now
    return page, [path for path in asked if path.startswith("/api/")]


async def test_the_overview_takes_one_request_for_data_and_follows_changes(
    dashboard: Dashboard,
) -> None:
    page, asked = await _watched(dashboard, "#/")
    other, asked_too = await _watched(dashboard, "#/")
    _, elsewhere = await _watched(dashboard, "#/agents")

    assert asked[0] == "/api/summary"  # of a server that has just started
    [stream] = asked[1:]
    assert stream.startswith("/api/events?since=")
    assert asked_too == []  # the page had the figures, and the stream is that of the first tab
    assert "/api/summary" not in elsewhere
    for tab in (page, other):
        await expect(tab.get_by_role("link", name="6 dead letters")).to_be_visible()
        await expect(tab.get_by_role("link", name="3 unread mail")).to_be_visible()

    sent = await page.request.post(
        f"{dashboard.address}/api/agents/cleo/mail", data={"from_agent": "ada", "subject": "new"}
    )
    assert sent.ok
    for tab in (page, other):
        await expect(tab.get_by_role("link", name="4 unread mail")).to_be_visible()
        await expect(tab.get_by_text("was created")).not_to_have_count(0)


async def test_a_page_that_waits_for_its_first_figures_is_there_and_says_so(
    dashboard: Dashboard,
) -> None:
    await dashboard.context.route("**/api/summary", lambda _: None)  # never answered
    page = await dashboard.open()
    await expect(page.get_by_text("the server reads every document once")).to_be_visible()
    await page.get_by_role("link", name="Changes").click()
    await expect(page.get_by_role("heading", name="Changes")).to_be_visible()


_FIGURES = """() => [document.querySelector("nav.main ul"), document.querySelector("h1"),
  document.querySelector(".tiles")].map((one) => one?.outerHTML)"""


async def test_the_server_draws_the_overview_as_its_scripts_do(dashboard: Dashboard) -> None:
    page = await dashboard.open()
    await expect(page.locator(".columns")).to_be_visible()
    drawn = await page.evaluate(_FIGURES)
    await page.route("**/app.js", lambda route: route.abort())
    await page.reload()

    assert await page.evaluate(_FIGURES) == drawn
    await expect(page.get_by_role("link", name="6 dead letters")).to_be_visible()
    await page.goto(f"{dashboard.address}/?other#/tasks")  # the fragment alone loads nothing
    await expect(page.locator("main.first")).to_be_attached()
    await expect(page.locator(".tiles")).to_be_hidden()


async def test_the_next_tab_goes_on_where_the_first_one_was(dashboard: Dashboard) -> None:
    page, _ = await _watched(dashboard, "#/")
    other, _ = await _watched(dashboard, "#/")
    asked: list[str] = []
    other.on("request", lambda request: asked.append(request.url))
    await page.close()
    await page.context.request.post(
        f"{dashboard.address}/api/agents/cleo/mail", data={"from_agent": "ada", "subject": "new"}
    )

    await expect(other.get_by_role("link", name="4 unread mail")).to_be_visible()
    assert "/api/events?since=" in asked[0]


async def test_filters_are_in_the_address_and_the_way_back_works(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/tasks")
    await page.get_by_label("Status").select_option("dead")
    await expect(page.locator("tbody tr")).to_have_count(6)
    assert page.url.endswith("#/tasks?status=dead")
    await page.get_by_label("Name").fill("nothing")
    await expect(page.get_by_text("No task is like that.")).to_be_visible()
    await page.get_by_label("Name").fill("fetch")
    await page.get_by_role("link", name="fetch").first.click()
    await expect(page.get_by_role("heading", name="Error")).to_be_visible()
    await expect(page.get_by_text("FileNotFoundError").first).to_be_visible()
    await page.go_back()
    await expect(page.locator("tbody tr")).to_have_count(6)
    await page.go_back()
    await expect(page.locator("tbody tr")).to_have_count(16)
    await page.reload()
    await expect(page.locator("tbody tr")).to_have_count(16)


async def test_tasks_run_again_one_or_all_that_match(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/tasks?status=dead&agent=ada")
    await page.get_by_role("link", name="fetch").first.click()
    await page.get_by_role("button", name="Run again").click()
    await page.get_by_role("dialog").get_by_role("button", name="Run again").click()

    def attempts() -> list[int]:
        tasks = _documents(dashboard.state, "tasks")
        return sorted(task["attempts"] for task in tasks if task["name"] == "fetch")

    await until(lambda: attempts() == [1, 1, 1, 1, 1, 2])  # it has failed again
    await page.go_back()
    await page.get_by_role("button", name="Run again all").click()
    await expect(page.get_by_text("3 tasks match")).to_be_visible()
    await page.get_by_role("button", name="Run again 3").click()
    await until(lambda: attempts() == [1, 1, 1, 2, 2, 3])
    await expect(page.get_by_text("Run again: 3 done.")).to_be_visible()


async def test_tasks_are_cancelled_and_deleted(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/tasks?agent=cleo")
    await page.get_by_role("button", name="Cancel all").click()
    await page.get_by_role("button", name="Cancel 3").click()
    await expect(page.locator(".status.cancelled")).to_have_count(3)
    await page.get_by_role("link", name="draft").first.click()
    await page.get_by_role("button", name="Delete").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()

    def mine() -> list[str]:
        tasks = _documents(dashboard.state, "tasks")
        return [task["status"] for task in tasks if task["agent_id"] == "cleo"]

    await until(lambda: mine() == ["cancelled", "cancelled"])


async def test_the_recorder_is_drawn_and_read_again(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/recorder")
    chart = page.get_by_role("img", name="Messages by day")
    await expect(chart.locator("rect")).to_have_count(10)
    await expect(page.get_by_role("heading", name="Tokens by model")).to_be_visible()
    await page.get_by_label("Score").select_option("spread")
    await expect(page.get_by_text("random speakers reach 70")).to_be_visible()
    async with Recorder(dashboard.state) as recorder:
        await recorder.record(
            {"sender_id": "newcomer", "timestamp": "2026-11-21T09:00:00Z", "content": "Hello."}
        )
    await expect(page.get_by_text("newcomer")).to_be_visible()
    await expect(chart.locator("rect")).to_have_count(12)


async def test_swagger_ui_asks_this_server_alone(
    browser: Browser, filled: tuple[Path, str], tmp_path: Path
) -> None:
    pytest.importorskip("fastapi_swagger", reason="the extra `swagger` is not installed")
    state = shutil.copytree(filled[0], tmp_path / "state")
    async with looking(browser, state, filled[1], "--read-only", "--swagger-ui") as dashboard:
        page = await dashboard.context.new_page()
        page.set_default_timeout(240_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: dashboard.errors.append(str(error)))
        page.on("console", lambda message: dashboard.look(message.type, message.text))
        await page.goto(f"{dashboard.address}/docs")
        await page.locator("#operations-tag-agents a").click()
        await page.locator("#operations-agents-list_agents button").first.click()
        await page.get_by_role("button", name="Try it out").click()
        await page.get_by_role("button", name="Execute").click()
        await expect(page.locator(".live-responses-table")).to_contain_text("researcher")
        assert [url for url in asked if not url.startswith((dashboard.address, "data:"))] == []


async def test_a_sleeper_is_woken_and_mail_is_sent(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/agents/dina")
    await expect(page.get_by_text("waits for the review")).to_be_visible()
    await page.get_by_role("button", name="Wake").click()
    await expect(page.get_by_text("waits for the review")).to_have_count(0)
    await page.get_by_role("button", name="Send mail").click()
    await page.get_by_label("Subject").fill("Hello")
    await page.get_by_label("Text").fill("It is <b>you</b>.")
    await page.get_by_role("button", name="Send", exact=True).click()
    await page.get_by_role("link", name="Hello").click()
    await expect(page.get_by_text("It is <b>you</b>.")).to_be_visible()

    def bodies() -> list[Any]:
        return [mail.get("body") for mail in _documents(dashboard.state, "mail")]

    await until(lambda: "It is <b>you</b>." in bodies())


async def test_the_sleepers_that_match_wake_once_they_were_counted(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/sleepers")
    await expect(page.get_by_role("link", name="dina")).to_be_visible()
    await page.get_by_label("Agent or reason").fill("nothing")
    await expect(page.get_by_text("No agent sleeps.")).to_be_visible()
    await page.get_by_label("Agent or reason").fill("review")
    await expect(page.get_by_role("link", name="dina")).to_be_visible()
    await page.get_by_role("button", name="Wake all").click()
    await expect(page.get_by_text("1 sleeper matches")).to_be_visible()
    await page.get_by_role("button", name="Wake 1").click()
    await expect(page.get_by_text("Wake: 1 done.")).to_be_visible()
    await expect(page.get_by_text("No agent sleeps.")).to_be_visible()
    await until(lambda: not any(one["is_sleeping"] for one in _documents(dashboard.state, "sleep")))


async def test_a_document_is_edited_and_not_over_the_change_of_another(
    dashboard: Dashboard,
) -> None:
    page = await dashboard.open("#/documents/agents/ada")
    await page.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Content (JSON)")
    body = json.loads(await field.input_value())
    await field.fill("{ no JSON")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("This is no JSON")).to_be_visible()
    await field.fill(json.dumps({**body, "agent_id": 5}))
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator(".notices .failed")).to_contain_text("agent_id")
    await field.fill(json.dumps({**body, "agent_name": "Ada L."}))
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_role("button", name="Edit")).to_be_visible()

    def name() -> str:
        return str(json.loads((dashboard.state / "agents/ada.json").read_text())["agent_name"])

    await until(lambda: name() == "Ada L.")
    await page.get_by_role("button", name="Earlier versions").click()
    await page.get_by_role("button", name="Edit").click()
    other = await dashboard.open("#/documents/agents/ada")
    await other.get_by_role("button", name="Edit").click()
    await other.get_by_label("Content (JSON)").fill(json.dumps({**body, "agent_name": "first"}))
    await other.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("It has changed since you began.")).to_be_visible()
    await page.get_by_label("Content (JSON)").fill(json.dumps({**body, "agent_name": "second"}))
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator(".notices .failed")).to_contain_text("changed since you began")
    await until(lambda: name() == "first")


_QUEUE = {"Name": "draft"}
_SEND = {"From": "me", "Subject": "Lost"}


@pytest.mark.parametrize(
    ("label", "action", "fields", "kind"),
    [("Queue a task", "Queue", _QUEUE, "tasks"), ("Send mail", "Send", _SEND, "mail")],
)
async def test_what_is_sent_again_after_a_lost_answer_is_done_once(
    dashboard: Dashboard, label: str, action: str, fields: dict[str, str], kind: str
) -> None:
    before = len(_documents(dashboard.state, kind))
    page = await dashboard.open("#/agents/cleo")

    lost: list[Route] = []

    async def lose(route: Route) -> None:
        if lost or route.request.method != "POST":
            await route.continue_()
            return
        lost.append(route)
        await route.fetch()  # it has been done, and nobody is told so
        await route.abort()

    await page.get_by_role("button", name=label).click()
    dialog = page.get_by_role("dialog")
    for name, value in fields.items():
        await dialog.get_by_label(name, exact=True).fill(value)
    await page.route("**/api/agents/**", lose)
    await dialog.get_by_role("button", name=action).click()
    await expect(dialog.get_by_role("alert")).to_contain_text("does not answer")
    await dialog.get_by_role("button", name=action).click()
    await expect(dialog).to_have_count(0)
    await page.get_by_role("button", name=label).click()  # the same words once more are new ones
    for name, value in fields.items():
        await dialog.get_by_label(name, exact=True).fill(value)
    await dialog.get_by_role("button", name=action).click()
    await expect(dialog).to_have_count(0)

    await until(lambda: len(_documents(dashboard.state, kind)) >= before + 2)
    assert len(_documents(dashboard.state, kind)) == before + 2


async def test_an_error_is_seen_where_it_was_caused(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/mail")
    await page.get_by_role("button", name="Send mail").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("To", exact=True).fill("nobody")
    await dialog.get_by_role("button", name="Send").click()
    await expect(dialog.get_by_role("alert")).to_contain_text("no such agent")
    await dialog.get_by_role("button", name="Close").click()
    await page.get_by_role("button", name="Send mail").click()
    await expect(dialog.get_by_role("alert")).to_have_count(0)


async def test_what_is_typed_stays_while_the_page_changes(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/agents/dina")
    await page.get_by_role("button", name="Let it sleep").click()
    await page.get_by_label("Minutes").fill("90")
    await page.get_by_label("New mail wakes it").uncheck()
    await page.request.put(
        f"{dashboard.address}/api/documents/agents?key=dina",
        data={"body": {"agent_id": "dina", "agent_type": "reviewer"}},
        headers={"If-Match": "*"},
    )
    await expect(page.get_by_text("Agent of the type reviewer")).to_be_visible()

    assert await page.get_by_label("Minutes").input_value() == "90"
    await expect(page.get_by_label("New mail wakes it")).not_to_be_checked()


async def test_what_was_not_counted_cannot_be_confirmed(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/tasks?agent=cleo")
    await page.route("**/api/tasks", lambda route: route.abort())
    await page.get_by_role("button", name="Cancel all").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.get_by_role("alert")).to_be_visible()
    await expect(dialog.get_by_role("button", name="…")).to_be_disabled()


async def test_a_second_click_does_nothing_more(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/agents/dina")
    asked: list[str] = []
    held: list[Route] = []

    async def hold(route: Route) -> None:
        if route.request.method == "GET":
            await route.continue_()
            return
        asked.append(route.request.url)
        held.append(route)

    await page.route("**/wake", hold)
    button = page.get_by_role("button", name="Wake")
    await button.click()
    await expect(button).to_have_attribute("aria-busy", "true")
    await button.click()
    await held[0].continue_()
    await expect(button).to_have_count(0)
    await page.goto(f"{dashboard.address}/#/documents/agents/dina")
    await page.get_by_role("button", name="Edit").click()
    await page.route("**/api/documents/**", hold)
    button = page.get_by_role("button", name="Save")
    await button.dblclick()
    await until(lambda: len(held) == 2)
    await held[1].continue_()
    await expect(page.get_by_role("button", name="Edit")).to_be_visible()
    await expect(page.locator(".failed")).to_have_count(0)

    assert len(asked) == 2


async def test_a_message_is_answered_once(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/mail?from=bela")
    await page.get_by_role("link", name="Budget").click()
    await page.get_by_role("button", name="Reply").click()
    other = await dashboard.open(page.url.removeprefix(f"{dashboard.address}/"))
    await other.get_by_role("button", name="Reply").click()
    await other.get_by_role("dialog").get_by_label("Text").fill("the first answer")
    await other.get_by_role("dialog").get_by_role("button", name="Reply").click()
    await expect(other.get_by_text("the first answer")).to_be_visible()
    await expect(other.get_by_role("button", name="Reply")).to_have_count(0)
    path = page.url.partition("#/mail/")[2]
    mailbox, _, message = path.partition("/")
    again = await page.request.post(
        f"{dashboard.address}/api/agents/{mailbox}/mail/{message}/reply", data={"body": "another"}
    )
    assert (await again.json())["body"] == "the first answer"  # so the page may not say otherwise


async def test_a_document_is_not_emptied_by_an_empty_field(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/documents/agents/ada")
    await page.get_by_role("button", name="Edit").click()
    await page.get_by_label("Content (JSON)").fill(" ")
    await page.get_by_role("button", name="Save").click()
    await expect(page.get_by_text("This is no JSON")).to_be_visible()


async def test_earlier_messages_that_do_not_come_are_an_error(dashboard: Dashboard) -> None:
    path = f"{dashboard.address}/api/global/session/{dashboard.session}/conversations"
    for number in range(60):
        said = await dashboard.context.request.post(
            f"{path}/guide_agent/messages", data={"role": "user", "content": f"number {number}"}
        )
        assert said.ok
    page = await dashboard.open(f"#/sessions/{dashboard.session}/guide_agent")
    await page.route("**/messages?before=*", lambda route: route.abort())
    await page.get_by_role("button", name="Earlier messages").click()
    await expect(page.locator(".notices .failed")).to_be_visible()
    await page.unroute("**/messages?before=*")
    await page.get_by_role("button", name="Earlier messages").click()
    await expect(page.get_by_text("Help me upload a file.")).to_be_visible()


async def test_beside_the_owner_nothing_can_be_changed(
    browser: Browser, filled: tuple[Path, str], tmp_path: Path
) -> None:
    state = shutil.copytree(filled[0], tmp_path / "state")
    async with (
        StatePersistenceManager(state, exclusive=True) as owner,
        looking(browser, state, filled[1], "--read-only") as dashboard,
    ):
        page = await dashboard.open("#/")
        await expect(page.get_by_text("read-only")).to_be_visible()
        for place in ("tasks", "agents/dina", "documents/agents/ada", "mail"):
            await page.evaluate("place => { location.hash = '#/' + place }", place)
            await expect(page.locator("h1")).to_be_visible()
            await _alone(page)
            await expect(page.locator("main button:not(:text('Earlier versions'))")).to_have_count(
                0
            )
        await page.evaluate("location.hash = '#/agents'")
        await expect(page.get_by_role("link", name="ada")).to_be_visible()
        await owner.save_agent_state("flora", {"agent_id": "flora"})
        await expect(page.get_by_role("link", name="flora")).to_be_visible()


async def test_a_server_with_tokens_asks_for_one(
    browser: Browser, filled: tuple[Path, str], tmp_path: Path
) -> None:
    state = shutil.copytree(filled[0], tmp_path / "state")
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    options = (*RUNTIME, "--token-file", str(tokens))
    async with looking(browser, state, filled[1], *options) as dashboard:
        page = await dashboard.open("#/agents")
        await page.get_by_label("Token").fill("nonsense")
        await page.get_by_role("button", name="Log in").click()
        await expect(page.locator(".notices .failed")).to_be_visible()
        made = await page.request.post(
            f"{dashboard.address}/api/global/session",
            data={},
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        await page.get_by_label("Token").fill((await made.json())["session_token"])
        await page.get_by_role("button", name="Log in").click()
        await expect(page.locator(".notices .failed")).to_contain_text("needs an operator's")
        await page.get_by_label("Token").fill(TOKEN)
        await page.get_by_role("button", name="Log in").click()
        await expect(page.get_by_role("link", name="ada")).to_be_visible()
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        assert TOKEN not in await page.evaluate("document.cookie + JSON.stringify(localStorage)")
        await page.get_by_role("link", name="ada").click()
        await page.get_by_role("button", name="Stop").click()
        await page.get_by_role("dialog").get_by_role("button", name="Stop").click()
        await expect(page.locator(".status.stopped")).to_be_visible()
        other = await dashboard.open("#/agents")
        await page.get_by_role("link", name="Access").click()
        await page.get_by_role("button", name="Log out").click()
        await expect(page.get_by_label("Token")).to_be_visible()
        assert await page.context.cookies() == []
        await other.get_by_role("link", name="ada").click()
        await expect(other.get_by_label("Token")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(dashboard: Dashboard, scheme: str) -> None:
    page = await dashboard.open("#/")
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    places = [*PLACES, f"#/sessions/{dashboard.session}/guide_agent"]
    found: dict[str, list[str]] = {}
    for place in places:
        await page.evaluate("place => { location.hash = place }", place)
        await expect(page.locator("h1")).to_be_visible()
        await _alone(page)
        results = await Axe().run(page)
        serious = [
            f"{one['id']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
            for one in results.response["violations"]
            if one["impact"] in {"serious", "critical"}
        ]
        if serious:
            found[place] = serious
    assert found == {}


async def test_a_phone_shows_each_page_without_scrolling_sideways(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/")
    await page.set_viewport_size({"width": 360, "height": 740})
    for place in PLACES:
        await page.evaluate("place => { location.hash = place }", place)
        await expect(page.locator("h1")).to_be_visible()
        await _alone(page)
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, place


async def test_the_keyboard_is_enough(dashboard: Dashboard) -> None:
    page = await dashboard.open("#/tasks?status=dead")
    await expect(page.locator("tbody tr")).to_have_count(6)
    await page.keyboard.press("Tab")
    await expect(page.get_by_text("To the content")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("button", name="Run again all")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_have_count(0)
