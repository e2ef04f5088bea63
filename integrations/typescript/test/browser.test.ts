/** Tabs of one browser share one stream. The browser is Debian's Chromium, the server a real one. */

import { fileURLToPath } from "node:url";
import type { SessionStore } from "@agent-state/client";
import { type Browser, type BrowserContext, chromium, type Page } from "playwright-core";
import { build } from "vite";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { FaultyProxy, until } from "./proxy.js";
import { Server } from "./server.js";

const CLIENT = fileURLToPath(new URL("../client/src/index.ts", import.meta.url));

declare global {
  interface Window {
    SessionStore: typeof SessionStore;
    store: SessionStore;
  }
}

let server: Server;
let proxy: FaultyProxy;
let browser: Browser;
let context: BrowserContext;
let script: string;

beforeAll(async () => {
  server = await Server.start();
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    chromiumSandbox: process.getuid?.() !== 0, // root has no sandbox
  });
  const result = await build({
    configFile: false,
    logLevel: "silent",
    build: {
      write: false,
      target: "es2022",
      lib: { entry: CLIENT, formats: ["es"] },
    },
  });
  const [bundle] = Array.isArray(result) ? result : [];
  script = bundle?.output[0].code ?? "";
});

beforeEach(async () => {
  proxy = await FaultyProxy.before(server.url);
  proxy.pages["/client.js"] = { type: "text/javascript", text: script };
  proxy.pages["/page"] = {
    type: "text/html",
    text: `<script type="module">
      import { SessionStore } from "./client.js";
      window.SessionStore = SessionStore;
    </script>`,
  };
  context = await browser.newContext();
});

afterEach(async () => {
  await context.close();
  await proxy.close();
});

afterAll(async () => {
  await browser.close();
  await server.remove();
});

/** Another tab, with the session of a token. */
async function tab(token: string): Promise<Page> {
  const page = await context.newPage();
  await page.goto(`${proxy.url}/page`);
  await page.waitForFunction(() => window.SessionStore);
  await page.evaluate((token) => {
    window.store = new window.SessionStore({ token });
    window.store.start();
  }, token);
  await page.waitForFunction(() => window.store.isSessionValid());
  return page;
}

const contents = (page: Page) =>
  page.evaluate(() =>
    (window.store.getSnapshot().conversations.poet?.messages ?? []).map(({ content }) => content),
  );

const send = (page: Page, text: string) =>
  page.evaluate((text) => window.store.sendMessage("poet", text).then(({ seq }) => seq), text);

const streams = () => proxy.open("/events");

test("nine tabs share one stream, and each hears of every message", async () => {
  const { id, token } = await server.session();
  const tabs: Page[] = [];
  for (let number = 0; number < 9; number++) tabs.push(await tab(token));
  await until(() => streams() === 1);

  await server.say(id, "poet", "hello");
  await send(tabs[4] as Page, "good day");

  for (const page of tabs) {
    await until(async () => (await contents(page)).length === 2);
    expect(await contents(page)).toEqual(["hello", "good day"]);
  }
  expect(proxy.count("GET", "/events")).toBe(1);
});

test("when the tab that reads is closed the next one reads on where it was", async () => {
  const { id, token } = await server.session();
  const first = await tab(token);
  await until(() => streams() === 1);
  await server.say(id, "poet", "1");
  await until(async () => (await contents(first)).length === 1);
  const second = await tab(token);
  await server.say(id, "poet", "2");
  await until(async () => (await contents(second)).length === 2);

  await first.close();
  await server.say(id, "poet", "3");

  await until(async () => (await contents(second)).length === 3);
  await until(() => streams() === 1);
  expect(proxy.count("GET", "/events")).toBe(2);
  expect(proxy.requests.findLast(({ path }) => path.endsWith("/events"))?.headers).toHaveProperty(
    "last-event-id",
  );
});

test("two tabs that talk at once, while the server is killed and started again", async () => {
  const { id, token } = await server.session();
  const tabs = [await tab(token), await tab(token)];
  const texts = tabs.map((_, tab) => Array.from({ length: 6 }, (_, number) => `${tab}-${number}`));
  await until(() => streams() === 1);

  const sent = tabs.map((page, number) =>
    Promise.all((texts[number] as string[]).map((text) => send(page, text))),
  );
  await until(async () => (await server.said(id, "poet")).length > 2);
  await server.kill();
  await server.start();
  await Promise.all(sent);

  const said = await server.said(id, "poet");
  for (const [number, page] of tabs.entries()) {
    expect(said.filter((text) => `${text}`.startsWith(`${number}-`))).toEqual(texts[number]);
    await until(async () => (await contents(page)).length === 12);
    expect(await contents(page)).toEqual(said);
  }
});

test("a page that is loaded again shows every message once", async () => {
  const { id, token } = await server.session();
  const page = await tab(token);
  await send(page, "before");
  await page.close();
  await server.say(id, "poet", "meanwhile");

  const again = await tab(token);

  expect(await contents(again)).toEqual(["before", "meanwhile"]);
});
