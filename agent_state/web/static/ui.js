// @ts-check
/** The parts that pages are made of. */
import { computed, h, htm, signal, useEffect, useId, useRef, useState } from "./vendor/libraries.mjs";
import { api, ApiError, request } from "./api.js";
import { takeGiven } from "./first.js";
import { onChange } from "./live.js";
import { place, requery, to } from "./router.js";

/** @type {(strings: TemplateStringsArray, ...values: any[]) => any} */
export const html = htm.bind(h);

/** What the server is, as the summary and `/health` say it. */
export const mode = signal(/** @type {"runtime" | "manager" | "read-only" | null} */ (null));
/** What installed packages add to the API, by its tags. */
export const addedRoutes = signal(/** @type {string[]} */ ([]));
/** Whether the server can change the state. */
export const writable = computed(() => mode.value === "runtime" || mode.value === "manager");
/** Whether the server runs agents, so that tasks can be queued and operated. */
export const hasRuntime = computed(() => mode.value === "runtime");
/** The server asks for a token. */
export const locked = signal(false);

// -- data ------------------------------------------------------------------------------------

const SHORTEST_PAUSE_MS = 20;
const NO_ANSWER_PAUSE_MS = 1000;

/** @template T @typedef {{data: T | undefined, etag: string | null, error: ApiError | null, reload: () => void}} Found */

/**
 * The answer to a GET, asked for again whenever something of these kinds changes, after a pause as
 * long as the last request took. While a request fails, the data stay as they were.
 * @param {string | null} path null asks for nothing
 * @param {string[]} [kinds]
 * @param {string[]} [under] only documents whose key begins with this
 * @returns {Found<any>} of the schema that the path has in the API
 */
export function useData(path, kinds = [], under = []) {
  const [found, setFound] = useState(
    () =>
      /** @type {{path: string | null, data: any, etag: string | null, error: ApiError | null}} */
      ({ path, data: takeGiven(path), etag: null, error: null }),
  );
  const isGiven = useRef(found.data !== undefined);
  const again = useRef(() => {});
  useEffect(() => {
    if (path === null) return undefined;
    let [over, asking, stale, pause, ended] = [false, false, false, 0, 0];
    /** @type {string | null} */
    let known = null;
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const ask = async () => {
      timer = undefined;
      const began = performance.now();
      let silent = false;
      [asking, stale] = [true, false];
      try {
        /** @type {Record<string, string>} */
        const headers = known ? { "If-None-Match": known } : {};
        const { status, etag, body } = await request("GET", path, { headers });
        if (over) return;
        if (status !== 304) {
          known = etag;
          setFound({ path, data: body, etag, error: null });
        } else {
          setFound((before) => (before.error ? { ...before, error: null } : before));
        }
      } catch (error) {
        if (over || !(error instanceof ApiError)) return;
        if (error.status === 401 || error.status === 403) locked.value = true; // also a session's token
        setFound((before) => ({
          ...(before.path === path ? before : { path, data: undefined, etag: null }),
          error,
        }));
        silent = error.code === "network";
      } finally {
        [asking, ended] = [false, performance.now()];
        pause = silent ? NO_ANSWER_PAUSE_MS : Math.max(SHORTEST_PAUSE_MS, ended - began);
        if (stale || silent) plan();
      }
    };
    const plan = (wait = ended + pause - performance.now()) => {
      if (over || timer) return;
      if (asking) stale = true;
      else if (wait <= 0) void ask();
      else timer = setTimeout(ask, wait);
    };
    again.current = () => plan(0);
    if (!isGiven.current) void ask();
    isGiven.current = false;
    const stop = onChange((change) => {
      if (!change || (kinds.includes(change.kind) && under.every((id, i) => change.key[i] === id)))
        plan();
    });
    return () => {
      over = true;
      clearTimeout(timer);
      stop();
    };
  }, [path, kinds.join(), under.join("/")]);
  const { data, etag, error } = found.path === path ? found : { data: undefined, etag: null, error: null };
  return { data, etag, error, reload: () => again.current() };
}

// -- small parts -----------------------------------------------------------------------------

const now = signal(Date.now());
setInterval(() => (now.value = Date.now()), 5000);

/** @param {number} seconds */
export function duration(seconds) {
  const steps = /** @type {[number, string][]} */ ([[86_400, "d"], [3600, "h"], [60, "min"]]);
  for (const [size, unit] of steps) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.max(0, Math.floor(seconds))} s`;
}

/** A time, as its distance from now. @param {{at: string | null | undefined}} props */
export function When({ at }) {
  if (!at) return html`<span class="none">–</span>`;
  const seconds = (now.value - Date.parse(at)) / 1000;
  const text = seconds < -1 ? `in ${duration(-seconds)}` : seconds < 2 ? "now" : `${duration(seconds)} ago`;
  return html`<time datetime=${at} title=${at}>${text}</time>`;
}

/** @param {{value: string}} props */
export const Status = ({ value }) => html`<span class="status ${value}">${value.replace("_", " ")}</span>`;

/** @param {{value: unknown, label?: string}} props */
export function Json({ value, label = "JSON" }) {
  const text = JSON.stringify(value, null, 2) ?? "–";
  return html`<pre class="json" tabindex="0" role="region" aria-label=${label}>${text}</pre>`;
}

/** A number for people. @param {number} value */
export const number = (value) => value.toLocaleString("en");

/** @param {{error: ApiError | null}} props */
export const Failure = ({ error }) =>
  error && html`<p class="failure" role="alert">${error.message}${error.code === "network" && " It is asked again."}</p>`;

/** @param {{found: Found<unknown>, children: any}} props */
export function Loaded({ found, children }) {
  return html`<${Failure} error=${found.error} />${
    found.data === undefined ? !found.error && html`<${Loading} />` : children
  }`;
}

const LONG_MS = 1000;

function Loading() {
  const [long, setLong] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setLong(true), LONG_MS);
    return () => clearTimeout(timer);
  }, []);
  return html`<p class="loading" aria-busy="true" role="status">${
    long ? "This takes longer: for the first look after its start, the server reads every document once." : "…"
  }</p>`;
}

/** @param {{title: string, children?: any, about?: any}} props */
export const Heading = ({ title, about, children }) => html`<header class="heading">
  <div><h1 tabindex="-1">${title}</h1>${about && html`<p>${about}</p>`}</div>
  <div class="actions">${children}</div></header>`;

/** Names and values. @param {{of: [string, any][]}} props */
export const Facts = ({ of }) => html`<dl class="facts">${of
  .filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false)
  .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

/**
 * A table; the first column is each row's link.
 * @param {{label: string, columns: string[], rows: {key: string, href?: string, cells: any[]}[], empty?: string}} props
 */
export function Table({ label, columns, rows, empty = "There is nothing here." }) {
  if (!rows.length) return html`<p class="empty">${empty}</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${label}><table>
    <thead><tr>${columns.map((name) => html`<th scope="col" key=${name}>${name}</th>`)}</tr></thead>
    <tbody>${rows.map(
      ({ key, href, cells: [first, ...rest] }) => html`<tr key=${key}>
        <th scope="row">${href ? html`<a href=${href}>${first}</a>` : first}</th>
        ${rest.map((cell, i) => html`<td key=${i} data-name=${columns[i + 1]}>${cell}</td>`)}</tr>`,
    )}</tbody></table></div>`;
}

/** What the answer of a list could not show. @param {{page: {unusable: string[]}}} props */
export const Unusable = ({ page }) =>
  page.unusable.length > 0 &&
  html`<p class="failure">Cannot be read: ${page.unusable.join(", ")}. <a href=${to(["quarantine"])}>Quarantine</a></p>`;

/** The way through the pages of a list; the place is in the address. @param {{next: string | null}} props */
export function Pager({ next }) {
  const { parts, query } = place.value;
  const at = query.get("after");
  if (!at && !next) return null;
  const rest = Object.fromEntries(query);
  return html`<nav class="pager" aria-label="Pages">
    ${at && html`<a href=${to(parts, { ...rest, after: null })}>First page</a>`}
    ${next && html`<a href=${to(parts, { ...rest, after: next })}>Next page</a>`}</nav>`;
}

/**
 * Filters of a list, kept in the address. Choices are taken at once, text as it is typed.
 * @param {{fields: {name: string, label: string, options?: string[], any?: string}[]}} props
 */
export function Filters({ fields }) {
  const { query } = place.value;
  return html`<form class="filters" role="search" onSubmit=${(/** @type {Event} */ event) => event.preventDefault()}>
    ${fields.map(({ name, label, options, any }) => {
      const value = query.get(name) ?? "";
      const set = (/** @type {any} */ event) =>
        requery({ [name]: event.currentTarget.value || null, after: null }, { replace: !options });
      return html`<label key=${name}>${label} ${
        options
          ? html`<select value=${value} onChange=${set}><option value="">${any ?? "any"}</option>${options.map(
              (one) => html`<option value=${one} selected=${one === value}>${one.replace("_", " ")}</option>`,
            )}</select>`
          : html`<input type="search" value=${value} onInput=${set} spellcheck=${false} placeholder=${any} />`
      }</label>`;
    })}</form>`;
}

// -- doing -----------------------------------------------------------------------------------

/** What was done last, for people and screen readers. */
export const notice = signal(/** @type {{text: string, failed: boolean} | null} */ (null));

/** @param {string} text @param {boolean} [failed] */
export function say(text, failed = false) {
  const mine = { text, failed };
  notice.value = mine;
  setTimeout(() => notice.value === mine && (notice.value = null), failed ? 15_000 : 5000);
}

/**
 * Do something, and say how it went. Resolves to whether it was done.
 * @param {() => Promise<unknown>} work
 * @param {string} [done]
 */
export async function attempt(work, done) {
  try {
    await work();
    if (done) say(done);
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) locked.value = true;
    say(error.message, true);
    return false;
  }
}

/** An idempotency key: what is sent twice with it is done once. */
export const newKey = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/**
 * A button that does something at once; a second click while it does so is none.
 * @param {{label: string, done: string, work: () => Promise<unknown>}} props
 */
export function ActionButton({ label, done, work }) {
  const [busy, setBusy] = useState(false);
  const act = async () => {
    if (busy) return;
    setBusy(true);
    await attempt(work, done).finally(() => setBusy(false));
  };
  // It is not disabled, which would take the keyboard's place from it.
  return html`<button type="button" aria-busy=${busy} onClick=${act}>${label}</button>`;
}

/**
 * A button that opens a dialog, whose form does something. The same content has the same key until
 * it is done, so that it is done once, even if an answer was lost.
 * @param {{label: string, title?: string, action: string, danger?: boolean, ready?: boolean, children?: any,
 *   onOpen?: () => void, onSubmit: (data: FormData, key: string) => Promise<boolean>}} props
 */
export function DialogButton({ label, title = label, action, danger, ready = true, children, onOpen, onSubmit }) {
  const dialog = useRef(/** @type {HTMLDialogElement | null} */ (null));
  const [open, setOpen] = useState(false);
  const [busy, setBusy] = useState(false);
  const sent = useRef({ content: "", key: "" });
  const id = useId();
  const said = notice.value;
  useEffect(() => {
    if (open) dialog.current?.showModal();
  }, [open]);
  const submit = async (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    if (busy || !ready) return;
    const data = new FormData(/** @type {HTMLFormElement} */ (event.currentTarget));
    const content = JSON.stringify([...data]);
    if (!sent.current.key || sent.current.content !== content) sent.current = { content, key: newKey() };
    setBusy(true);
    notice.value = null;
    try {
      if (await onSubmit(data, sent.current.key)) {
        sent.current.key = "";
        setOpen(false);
      }
    } finally {
      setBusy(false);
    }
  };
  const show = () => {
    notice.value = null;
    onOpen?.();
    setOpen(true);
  };
  return html`<button type="button" class=${danger && "danger"} onClick=${show}>${label}</button>
    ${open && html`<dialog ref=${dialog} aria-labelledby=${id} onClose=${() => setOpen(false)}>
      <form onSubmit=${submit}><h2 id=${id}>${title}</h2>${children}
      ${said?.failed && html`<p class="failure" role="alert">${said.text}</p>`}
      <div class="actions"><button type="button" onClick=${() => setOpen(false)}>Close</button>
      <button type="submit" class=${danger ? "danger" : "primary"} disabled=${busy || !ready}>${action}</button></div>
      </form></dialog>`}`;
}

/**
 * One action on all that a filter matches; they are counted first.
 * @param {{label: string, what: [string, string], filter: Record<string, unknown>, danger?: boolean, children?: any,
 *   operate: (dryRun: boolean) => Promise<{body: Api["OperationReport"]}>}} props
 */
export function Many({ label, what: [one, many], filter, danger, operate, children }) {
  const [count, setCount] = useState(/** @type {number | null} */ (null));
  const open = () => {
    setCount(null);
    void attempt(async () => setCount((await operate(true)).body.matched));
  };
  const submit = async () => {
    let report = /** @type {Pick<Api["OperationReport"], "changed" | "refused">} */ ({ changed: 0, refused: {} });
    const done = await attempt(async () => (report = (await operate(false)).body));
    const left = Object.keys(report.refused).length;
    if (done) say(`${label}: ${number(report.changed)} done${left ? `, ${number(left)} left as they were` : ""}.`);
    return done;
  };
  const filters = Object.entries(filter).filter(([, value]) => value && String(value));
  return html`<${DialogButton} label=${`${label} all …`} title=${`${label} all ${many} that match`} danger=${danger} ready=${count !== null}
    action=${count === null ? "…" : `${label} ${number(count)}`} onOpen=${open} onSubmit=${submit}>
    <p class="count" aria-live="polite">${count === null ? "They are being counted." : html`<strong>${number(count)}</strong> ${count === 1 ? `${one} matches` : `${many} match`}${filters.length ? ":" : "."}`}</p>
    ${filters.length > 0 && html`<ul>${filters.map(([name, value]) => html`<li key=${name}>${name.replace("_id", "")}: ${String(value)}</li>`)}</ul>`}
    ${children}<//>`;
}

/** A labelled field of a form. @param {{label: string, children: any}} props */
export const Field = ({ label, children }) => html`<label class="field"><span>${label}</span>${children}</label>`;

/** @param {FormData} data @param {string} name */
export const text = (data, name) => String(data.get(name) ?? "").trim();

/** JSON that a person typed; empty text stands for the default, if there is one. @param {string} typed @param {unknown} [otherwise] */
export function typedJson(typed, otherwise) {
  if (!typed && otherwise !== undefined) return otherwise;
  try {
    return JSON.parse(typed);
  } catch (error) {
    throw new ApiError(0, "not_json", `This is no JSON: ${/** @type {Error} */ (error).message}`);
  }
}

/** The path of a document's page. @param {string} kind @param {string[]} key */
export const documentPlace = (kind, key) => to(["documents", kind, ...key]);
/** The path of a document in the API. @param {string} kind @param {string[]} key */
export const documentPath = (kind, key) => api(["documents", kind], { key });
