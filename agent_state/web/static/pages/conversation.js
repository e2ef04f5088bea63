// @ts-check
/** One conversation: its messages by number, and what is on its way to it. */
import { useEffect, useRef, useState } from "../vendor/libraries.mjs";
import { ApiError, api, get, post } from "../api.js";
import { onChange } from "../live.js";
import { to } from "../router.js";
import { Failure, Heading, Json, When, attempt, html, locked, newKey, text, writable } from "../ui.js";

const PAGE = 50;
const PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;

/** @typedef {{key: string, content: string, role: string, error?: string}} Outgoing */

/**
 * Messages that the server has not acknowledged. They survive a reload, and each is sent with its
 * own key until it is: a message that arrived and was not acknowledged is stored once.
 * @param {string} name
 * @returns {Outgoing[]}
 */
function stored(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name) ?? "[]");
  } catch {
    return [];
  }
}

/** @param {ApiError} error */
const passes = (error) => error.status === 0 || error.status === 429 || error.status >= 502;

/** @param {{session: string, agent: string}} props */
export function Conversation({ session, agent }) {
  const path = ["global", "session", session, "conversations", agent, "messages"];
  const name = `outgoing ${session} ${agent}`;
  const messages = useRef(/** @type {Map<number, Api["SessionMessage"]>} */ (new Map()));
  /** Everything up to this number has been read. An answer to a message of our own may be ahead of it. */
  const upTo = useRef(0);
  const outgoing = useRef(/** @type {Outgoing[]} */ (stored(name)));
  const earlier = useRef(/** @type {number | null} */ (null));
  const [error, setError] = useState(/** @type {ApiError | null} */ (null));
  const [, draw] = useState(0);
  const end = useRef(/** @type {HTMLElement | null} */ (null));
  const wake = useRef(() => {});

  const keep = () => {
    sessionStorage.setItem(name, JSON.stringify(outgoing.current));
    draw((n) => n + 1);
  };
  const take = (/** @type {Api["SessionMessage"][]} */ some) => {
    for (const one of some) messages.current.set(one.seq ?? 0, one);
    draw((n) => n + 1);
  };

  useEffect(() => {
    let [over, asking, again, pause] = [false, false, false, PAUSE_MS];
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    const load = async () => {
      if (asking || over) {
        again = true;
        return;
      }
      asking = true;
      clearTimeout(timer);
      try {
        do {
          again = false;
          const last = upTo.current;
          const { body } = await get(api(path, last ? { after: last, limit: 1000 } : { limit: PAGE }));
          if (over) return;
          if (!last) earlier.current = body.next_before;
          take(body.messages);
          upTo.current = Math.max(last, ...body.messages.map((/** @type {any} */ one) => one.seq));
          again ||= Boolean(last && body.next_after && body.messages.length === 1000);
          pause = PAUSE_MS;
          setError(null);
        } while (again);
      } catch (failure) {
        if (over || !(failure instanceof ApiError)) return;
        if (failure.status === 401) locked.value = true;
        setError(failure);
        if (passes(failure)) timer = setTimeout(load, (pause = Math.min(pause * 2, LONGEST_PAUSE_MS)));
      } finally {
        asking = false;
      }
    };
    void load();
    const stop = onChange((change) => {
      if (!change || (change.kind === "sessions" && change.key[0] === session)) void load();
    });
    return () => {
      over = true;
      clearTimeout(timer);
      stop();
    };
  }, [session, agent]);

  useEffect(() => {
    let [over, sending, pause] = [false, false, PAUSE_MS];
    const send = async () => {
      if (sending) return;
      sending = true;
      while (!over && outgoing.current.length && !outgoing.current[0].error) {
        const [first] = outgoing.current;
        try {
          const { body } = await post(api(path), { role: first.role, content: first.content }, { "Idempotency-Key": first.key });
          outgoing.current = outgoing.current.filter((one) => one !== first);
          pause = PAUSE_MS;
          take([body.message]);
          keep();
        } catch (failure) {
          if (!(failure instanceof ApiError)) throw failure;
          if (failure.status === 401) {
            locked.value = true; // it is sent after the login
            break;
          }
          if (!passes(failure)) {
            outgoing.current = outgoing.current.map((one) => (one === first ? { ...one, error: failure.message } : one));
            keep();
          } else {
            await new Promise((resolve) => setTimeout(resolve, pause));
            pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
          }
        }
      }
      sending = false;
    };
    wake.current = () => void send();
    void send();
    return () => void (over = true);
  }, [session, agent]);

  const shown = [...messages.current].sort(([a], [b]) => a - b).map(([, one]) => one);
  const newest = shown.at(-1)?.seq;
  useEffect(() => end.current?.scrollIntoView({ block: "nearest" }), [newest, outgoing.current.length]);

  const submit = (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    const form = /** @type {HTMLFormElement} */ (event.currentTarget);
    const data = new FormData(form);
    const content = text(data, "content");
    if (!content) return;
    outgoing.current = [...outgoing.current, { key: newKey(), content, role: text(data, "role") }];
    /** @type {HTMLTextAreaElement} */ (form.elements.namedItem("content")).value = "";
    keep();
    wake.current();
  };
  const drop = (/** @type {Outgoing} */ one) => {
    outgoing.current = outgoing.current.filter((other) => other !== one);
    keep();
    wake.current();
  };
  const more = () => attempt(async () => {
    const { body } = await get(api(path, { before: earlier.current, limit: PAGE }));
    earlier.current = body.next_before;
    take(body.messages);
  });
  return html`<${Heading} title=${agent} about=${html`Conversation of the session <a href=${to(["sessions", session])}>${session}</a>`} />
    <${Failure} error=${error} />
    ${earlier.current && html`<p><button type="button" onClick=${more}>Earlier messages</button></p>`}
    <ol class="messages talk" aria-label="Messages">${shown.map((one) => html`<li key=${one.seq} class=${one.role}>
      <p class="by">${one.role} <span class="none">#${one.seq}</span>, <${When} at=${one.timestamp} /></p>
      ${typeof one.content === "string" ? html`<p class="text">${one.content}</p>` : html`<${Json} value=${one.content} label=${`Message ${one.seq}`} />`}</li>`)}
      ${outgoing.current.map((one) => html`<li key=${one.key} class=${`outgoing ${one.role}`}>
        <p class="by">${one.role} ${one.error ? html`<strong>refused: ${one.error}</strong> <button type="button" onClick=${() => drop(one)}>Drop</button>` : "is being sent"}</p>
        <p class="text">${one.content}</p></li>`)}</ol>
    ${!shown.length && !outgoing.current.length && html`<p class="empty">Nothing has been said.</p>`}
    ${writable.value && html`<form class="compose" onSubmit=${submit}>
      <label>As <select name="role"><option>assistant</option><option>user</option><option>system</option></select></label>
      <label class="field"><span>Message</span><textarea name="content" rows="2" required onKeyDown=${(/** @type {KeyboardEvent} */ event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          /** @type {HTMLTextAreaElement} */ (event.currentTarget).form?.requestSubmit();
        }
      }}></textarea></label>
      <button type="submit" class="primary">Send</button></form>`}
    <div ref=${end}></div>`;
}
