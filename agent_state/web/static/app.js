// @ts-check
/** The page around the pages: navigation, login, and which page is shown. */
import { render, signal, useEffect, useRef } from "./vendor/libraries.mjs";
import { ApiError, get, request } from "./api.js";
import { connection, follow } from "./live.js";
import { place, to } from "./router.js";
import { Field, Heading, addedRoutes, attempt, html, locked, mode, notice, text } from "./ui.js";
import { Overview } from "./pages/overview.js";

/** @typedef {(props: {parts: string[], query: URLSearchParams}) => any} Page */

/** The pages by the first part of their place, each loaded when it is first shown. */
const PAGES = /** @type {Record<string, () => Promise<Page>>} */ ({
  agents: async () => (await import("./pages/agents.js")).Agents,
  tasks: async () => (await import("./pages/tasks.js")).Tasks,
  mail: async () => (await import("./pages/mail.js")).Mail,
  sessions: async () => (await import("./pages/sessions.js")).Sessions,
  journeys: async () => (await import("./pages/journeys.js")).Journeys,
  recorder: async () => (await import("./pages/recorder.js")).RecorderPage,
  changes: async () => (await import("./pages/changes.js")).Changes,
  documents: async () => (await import("./pages/documents.js")).Documents,
  logs: async () => (await import("./pages/logs.js")).Logs,
  sleepers: async () => (await import("./pages/sleepers.js")).Sleepers,
  access: async () => (await import("./pages/access.js")).Access,
  quarantine: async () => (await import("./pages/quarantine.js")).Quarantine,
});
const SHOWN = ["agents", "tasks", "mail", "sessions", "journeys", "recorder", "changes", "logs", "access"];
/** Those whose routes are an installed package's. */
const ADDED = ["journeys", "recorder"];

const loaded = signal(/** @type {Record<string, Page>} */ ({ "": Overview }));

/** @param {string} name */
async function load(name) {
  const page = PAGES[name];
  const shown = page ? await page() : Unknown;
  loaded.value = { ...loaded.peek(), [name]: shown };
}

/** Ask what the server is; the overview has it from its summary. */
async function learn() {
  try {
    /** @type {{body: Api["Health"]}} */
    const { body } = await get("health");
    [mode.value, addedRoutes.value] = [body.mode, body.added_routes];
  } catch {
    setTimeout(learn, 2000); // it does not answer now; the page says so
  }
}

const Unknown = () => html`<${Heading} title="There is no such page" /><p><a href="#/">Overview</a></p>`;

function Login() {
  const submit = (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    const token = text(new FormData(/** @type {HTMLFormElement} */ (event.currentTarget)), "token");
    void attempt(async () => {
      const { body } = await request("POST", "api/login", { body: { token } });
      if (body.role !== "operator") {
        await request("DELETE", "api/login");
        throw new ApiError(403, "forbidden", "This is the token of a session. The dashboard needs an operator's.");
      }
      locked.value = false;
    }, "Logged in.");
  };
  return html`<form class="login" onSubmit=${submit}>
    <h1 tabindex="-1">agent_state</h1>
    <p>This server asks for an operator's token. It is kept in a cookie that no script can read.</p>
    <${Field} label="Token"><input type="password" name="token" required autocomplete="current-password" /><//>
    <div class="actions"><button type="submit" class="primary">Log in</button></div></form>`;
}

const WORDS = { connecting: "connecting …", live: "live", lost: "no connection" };

function Navigation() {
  const [here = ""] = place.value.parts;
  const shown = SHOWN.filter((name) => !ADDED.includes(name) || addedRoutes.value.includes(name));
  const link = (/** @type {string} */ name, /** @type {string} */ label) => html`<li key=${name}>
    <a href=${to(name ? [name] : [])} aria-current=${name === here ? "page" : undefined}>${label}</a></li>`;
  return html`<nav class="main" aria-label="Main">
    <p class="brand">agent_state <span class=${`connection ${connection.value}`} role="status">${WORDS[connection.value]}</span></p>
    <ul>${link("", "Overview")}${shown.map((name) => link(name, name.charAt(0).toUpperCase() + name.slice(1)))}</ul></nav>`;
}

function App() {
  const { parts, query } = place.value;
  const [name = "", ...rest] = parts;
  const main = useRef(/** @type {HTMLElement | null} */ (null));
  const Shown = loaded.value[name];
  const path = parts.join("/");
  const first = useRef(true);
  useEffect(() => {
    if (!Shown) void load(name);
    if (name && !mode.peek()) void learn();
  }, [name]);
  useEffect(() => {
    if (!Shown) return;
    const heading = main.current?.querySelector("h1");
    document.title = `${heading?.textContent ?? "agent_state"} – agent_state`;
    if (!first.current) {
      scrollTo(0, 0);
      heading?.focus({ preventScroll: true });
    }
    first.current = false;
  }, [path, Boolean(Shown)]);
  useEffect(() => {
    if (!locked.value) follow();
  }, [locked.value]);
  const said = notice.value;
  return html`
    <a class="skip" href="#main" onClick=${(/** @type {Event} */ event) => {
      event.preventDefault();
      main.current?.querySelector("h1")?.focus();
    }}>To the content</a>
    ${!locked.value && html`<${Navigation} />`}
    <main id="main" ref=${main}>${
      locked.value ? html`<${Login} />` : Shown && html`<${Shown} key=${path} parts=${rest} query=${query} />`
    }</main>
    <div class="notices" role="status" aria-live="polite">${
      said && html`<p class=${said.failed ? "failed" : ""}>${said.text}</p>`
    }</div>`;
}

const root = /** @type {HTMLElement} */ (document.getElementById("app"));
root.textContent = "";
render(html`<${App} />`, root);
