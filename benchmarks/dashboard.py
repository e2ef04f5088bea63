"""The dashboard in Chromium, beside a page without scripts that has as many bytes, in turns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_state.web.dashboard import static_files
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

AGENTS = 1000
TASKS_EACH = 100
CHANGES = 20
_WAIT_MS = 300_000
_STATUSES = ("completed",) * 97 + ("dead", "cancelled", "pending")

_SEEN = """new Promise((resolve) => {
  const look = () => document.querySelector(".tile .value")
    ?.checkVisibility({ visibilityProperty: true })
    ? setTimeout(() => resolve(performance.now())) : requestAnimationFrame(look);
  requestAnimationFrame(look);
})"""
"""When the first figures were drawn, in milliseconds since the page was asked for."""

_CHANGE = """(path) => new Promise((resolve, reject) => {
  const tile = [...document.querySelectorAll(".tile")]
    .find((one) => one.textContent.includes("unread mail"));
  const before = tile.querySelector(".value").textContent;
  const began = performance.now();
  new MutationObserver((_, observer) => {
    if (tile.querySelector(".value").textContent === before) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began)));
  }).observe(tile, { childList: true, subtree: true, characterData: true });
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ from_agent: "a1", subject: "new" });
  fetch(path, { method: "POST", headers, body })
    .then((answer) => answer.ok || reject(answer.status));
})"""
"""The time from a change's request until its figure was drawn."""


def dashboard(setting: Setting) -> list[Row]:
    """The overview of many agents and tasks: until it is seen, and until a change is seen in it.

    The page without scripts has the same content, and as many bytes on the wire. Both are loaded
    without a cache. The request that makes the change, and its save, count.
    """
    from playwright.sync_api import sync_playwright

    agents = setting.scaled(AGENTS)
    shown, plain, data, changes = [], [], [], []
    with setting.folder() as folder, sync_playwright() as driver:
        fill(folder / "state", agents)
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        with _serving(folder / "state") as address:
            with _page(browser, address) as (page, first, _):
                html = page.locator("main").inner_html()
            with _static_server() as static:
                for _ in range(max(setting.runs, 5)):
                    with _page(browser, address) as (page, seen, sent):
                        shown.append(seen)
                        page.get_by_text("live", exact=True).wait_for()
                        page.wait_for_timeout(1000)  # a second request would come by now
                        asked = page.evaluate(_ASKED)
                        data.append(float(sum("/api/events" not in one for one in asked)))
                    static.body = _static(html, sent)
                    with _page(browser, static.address) as (_, seen, _):
                        plain.append(seen)
            with _page(browser, address) as (page, _, _):
                page.get_by_text("live", exact=True).wait_for()
                for number in range(setting.scaled(CHANGES)):
                    path = f"api/agents/a{number}/mail"
                    changes.append(float(page.evaluate(_CHANGE, path)))
        browser.close()
    ratios = [one / other for one, other in zip(shown, plain, strict=True)]
    scripts = sum(
        len(file.packed) for path, file in static_files().items() if path.endswith(("js", "mjs"))
    )
    what = f"overview of {agents:,} agents and {agents * TASKS_EACH:,} tasks"
    return [
        Row(f"{what}: first content", shown, "ms"),
        Row("  a page without scripts, of as many bytes", plain, "ms"),
        Row("  ratio", ratios, "times", at_most(3)),
        Row("  requests for data", data, "", at_most(1)),
        Row("  the first one after a start, which reads every document", [first], "ms"),
        Row("a change until it is seen, with its save", changes, "ms", at_most(200)),
        Row("the page's scripts, gzipped", [scripts / 1000], "kB", at_most(60)),
    ]


_ASKED = """performance.getEntriesByType("resource").map(({ name }) => name)
  .filter((name) => name.includes("/api/"))"""
_SENT = """["navigation", "resource"].flatMap((type) => performance.getEntriesByType(type))
  .reduce((sum, { encodedBodySize }) => sum + encodedBodySize, 0)"""


def fill(state: Path, agents: int) -> None:
    """Write the documents as a person would, without their checksums."""
    for number in range(agents):
        agent = f"a{number}"
        _write(state / "agents" / f"{agent}.json", agent_id=agent, agent_type=f"type{number % 5}")
        for task in range(TASKS_EACH):
            at = f"2026-11-{1 + task % 28:02}T{number % 24:02}:{task % 60:02}:00.000000Z"
            _write(
                state / "tasks" / agent / f"t{task}.json",
                agent_id=agent,
                task_id=f"t{task}",
                name="read",
                payload={"file": f"file-{task}.txt"},
                status=_STATUSES[task % len(_STATUSES)],
                created_at=at,
            )


def _write(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@contextmanager
def _serving(state: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "agent_state", "serve", str(state), "--port", "0"]
    # What a start says of each agent without a handler is much, and would fill a pipe.
    with (state.parent / "said").open("w") as said:
        server = subprocess.Popen(  # noqa: S603  # our own command
            command, stdout=subprocess.PIPE, stderr=said, text=True
        )
    assert server.stdout is not None
    try:
        line = ""
        while not line.startswith("http://"):
            line = server.stdout.readline()
            assert line, (state.parent / "said").read_text()[-1000:]
        yield line.split()[0]
    finally:
        server.kill()
        server.communicate()


@contextmanager
def _page(browser: Browser, address: str) -> Iterator[tuple[Page, float, int]]:
    """The page in a new profile, when its figures were drawn, and the bytes that were sent."""
    context: BrowserContext = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(_WAIT_MS)
    page.add_init_script(f"window.seen = {_SEEN}")
    page.goto(f"{address}/", wait_until="commit")
    seen = float(page.evaluate("window.seen"))
    sent = int(page.evaluate(_SENT))
    yield page, seen, sent
    context.close()
    time.sleep(0.2)  # the closed page's stream ends


class _StaticServer(ThreadingHTTPServer):
    body = b""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _StaticServer)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        """Say nothing of each request."""


@contextmanager
def _static_server() -> Iterator[_StaticServer]:
    server = _StaticServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def _static(html: str, size: int) -> bytes:
    """A page with this content, filled up to the size by a comment before it."""
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">'
    style = f"<style>{static_files()['style.css'].body.decode()}</style>"
    rest = len(f"{page}{style}<!---->{html}".encode())
    if rest > size:
        style, rest = "", rest - len(style.encode())
    return f"{page}{style}<!--{'x' * max(0, size - rest)}--><div>{html}</div>".encode()
