"""The dashboard's files as they are served; ``tests/browser`` looks at the page in a browser."""

from __future__ import annotations

import gzip
import json
import re
import runpy
from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from html import escape, unescape
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.web import LiveBackend
from agent_state.web.auth import cookie_name
from agent_state.web.dashboard import static_files
from tests.web.client import TOKEN, Client, answering

ROOT = Path(__file__).parents[2]
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}
STATIC = Path(str(files("agent_state.web") / "static"))
MOST_BYTES_OF_SCRIPTS = 60_000


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with (
        StatePersistenceManager(store=MemoryStateStore()) as manager,
        answering(LiveBackend(manager=manager), dashboard=True) as client,
    ):
        client.headers.pop("Authorization")
        yield client


async def test_the_page_is_served_to_anybody_and_the_state_is_not(client: Client) -> None:
    page = await client.get("/")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert (await client.get("/api/summary")).status_code == 401
    assert (await client.post("/api/login", json={"token": TOKEN})).status_code == 200
    assert (await client.get("/api/summary")).status_code == 200


async def test_nothing_runs_but_what_the_server_has(client: Client) -> None:
    policy = (await client.get("/")).headers["content-security-policy"]

    for directive in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
        "frame-ancestors 'none'",
    ):
        assert directive in policy.split("; ")
    assert "unsafe" not in policy


def test_the_page_has_no_inline_script_or_style_and_no_absolute_address() -> None:
    page = (STATIC / "index.html").read_text()

    assert re.findall(r"<script(?![^>]*\bsrc=)", page) == []
    assert "<style" not in page
    assert re.findall(r'\b(?:src|href)="(?:/|\w+:)', page) == []
    for path in re.findall(r'\b(?:src|href)="static/([^"]+)"', page):
        assert path in static_files()


def test_every_module_is_there_and_is_asked_for_by_a_relative_path() -> None:
    for path, file in static_files().items():
        if path.endswith(("js", "mjs")):
            imports = re.findall(rb'\b(?:from|import\()\s*"([\w@./-]+)"', file.body)
            for name in imports:
                found = (STATIC / path).parent / name.decode()
                assert found.is_file(), f"{path} imports {name.decode()}"
                assert name.startswith(b"."), f"{path} imports {name.decode()}"


def test_what_the_overview_needs_is_asked_for_at_once() -> None:
    """No module is found only when another one has arrived."""
    page = (STATIC / "index.html").read_text()
    asked = re.findall(r'<(?:link rel="modulepreload" href|script [^>]*src)="static/([^"]+)"', page)
    needed, waiting = set[str](), ["app.js", "pages/overview.js"]
    while waiting:
        path = waiting.pop()
        if path not in needed:
            needed.add(path)
            imports = re.findall(rb'\bfrom\s*"([\w@./-]+)"', static_files()[path].body)
            waiting += [
                str(((STATIC / path).parent / one.decode()).resolve().relative_to(STATIC))
                for one in imports
            ]

    assert sorted(asked) == sorted(needed)


def test_all_scripts_together_are_small() -> None:
    scripts = {path: file for path, file in static_files().items() if path.endswith(("js", "mjs"))}

    assert sum(len(file.packed) for file in scripts.values()) < MOST_BYTES_OF_SCRIPTS


def test_our_scripts_are_checked_and_the_others_have_their_licences() -> None:
    ours = [path for path in STATIC.rglob("*.js") if "vendor" not in path.parts]
    vendored = {path.stem for path in (STATIC / "vendor").glob("*.mjs")}

    assert [path.name for path in ours if not path.read_text().startswith("// @ts-check\n")] == []
    assert vendored == {"libraries"}
    licences = {path.name for path in (STATIC / "vendor").glob("LICENSE.*")}
    assert licences == {"LICENSE.htm", "LICENSE.preact", "LICENSE.preactsignals"}


def test_the_libraries_are_what_their_modules_are_made_into() -> None:
    joined = runpy.run_path(str(ROOT / ".ci/libraries"))["joined"]

    assert (STATIC / "vendor" / "libraries.mjs").read_text() == joined()


async def test_the_figures_are_in_the_page_for_who_may_see_them(client: Client) -> None:
    cold = await client.get("/")
    cookie = cookie_name(client.base_url.netloc.decode())
    operator = {"Cookie": f"{cookie}={TOKEN}"}
    made = (await client.post("/api/global/session", json={}, headers=OPERATOR)).json()
    asked = await client.get("/api/summary", headers=OPERATOR)
    nobody = await client.get("/")
    visitor = await client.get("/", headers={"Cookie": f"{cookie}={made['session_token']}"})
    unknown = await client.get("/", headers={"Cookie": f"{cookie}=nonsense"})
    shown = await client.get("/", headers=operator)

    for page in (cold, nobody, visitor, unknown):
        assert page.status_code == 200
        assert 'name="summary"' not in page.text
        assert "tiles" not in page.text
        assert page.headers["cache-control"] == "no-cache"
    [(content, event_id)] = re.findall(
        r'<meta name="summary" content="([^"]*)" data-event="([^"]*)">', shown.text
    )
    assert {**json.loads(unescape(content)), "now": ""} == {**asked.json(), "now": ""}
    assert event_id == asked.headers["last-event-id"]
    assert '<span class="value">1</span> <span class="label">sessions</span>' in shown.text
    assert shown.headers["cache-control"] == "no-store"
    assert re.findall(r"<script(?![^>]*\bsrc=)", shown.text) == []
    [style] = re.findall(r"<style>(.*)</style>", shown.text, re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = shown.headers["content-security-policy"]
    assert f"style-src 'self' 'sha256-{digest}'" in policy.split("; ")
    assert "unsafe" not in policy


async def test_the_name_of_a_directory_is_text_and_no_markup(tmp_path: Path) -> None:
    state = tmp_path / 'a"><script src=x>&'
    async with (
        StatePersistenceManager(state) as manager,
        answering(LiveBackend(manager=manager), dashboard=True, token=None) as client,
    ):
        summary = (await client.get("/api/summary")).json()
        page = (await client.get("/")).text

    assert "<script src=x>" in summary["directory"]
    assert "<script src=x>" not in page
    assert escape(summary["directory"]) in page


async def test_a_file_is_compressed_and_not_sent_twice(client: Client) -> None:
    headers = {"Accept-Encoding": "gzip"}
    async with client.stream("GET", "/static/style.css", headers=headers) as answer:
        body = b"".join([part async for part in answer.aiter_raw()])
    again: httpx.Response = await client.get(
        "/static/style.css", headers={"If-None-Match": answer.headers["etag"]}
    )

    assert gzip.decompress(body) == (STATIC / "style.css").read_bytes()
    assert answer.headers["content-type"] == "text/css; charset=utf-8"
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["nobody.js", "../dashboard.py", "..%2Fdashboard.py", "", "vendor"]
)
async def test_no_other_file_is_served(client: Client, path: str) -> None:
    answer = await client.get(f"/static/{path}")

    assert answer.status_code == 404


async def test_swagger_ui_is_served_by_choice_and_from_here(client: Client) -> None:
    pytest.importorskip("fastapi_swagger", reason="the extra `swagger` is not installed")
    assert (await client.get("/docs")).status_code == 404
    async with (
        StatePersistenceManager(store=MemoryStateStore()) as manager,
        answering(LiveBackend(manager=manager), swagger_ui=True) as choosing,
    ):
        page = await choosing.get("/docs")
        parts = re.findall(r'\b(?:src|href)="(docs/[^"]+)"', page.text)
        answers = [await choosing.get(f"/{part}") for part in parts]
        other = await choosing.get("/docs/favicon-32x32.png")

    assert len(parts) == 4
    assert {answer.status_code for answer in answers} == {200}
    assert other.status_code == 404
    assert re.findall(r'\b(?:src|href)="(?:/|\w+:)', page.text) == []
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= set(policy)
    assert not [one for one in policy if "unsafe" in one]


async def test_an_application_serves_no_dashboard_unless_it_says_so() -> None:
    async with (
        StatePersistenceManager(store=MemoryStateStore()) as manager,
        answering(LiveBackend(manager=manager)) as client,
    ):
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/static/style.css")).status_code == 404
