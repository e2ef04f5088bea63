// @ts-check
/**
 * Live changes, over one event stream for all tabs: the tab that holds the lock opens it, and tells
 * the others. A browser permits six connections to a server, and a stream takes one.
 */
import { eventId } from "./first.js";
import { signal } from "./vendor/libraries.mjs";

/** @typedef {{kind: string, key: string[], revision: number | null, outside: boolean}} Change */
/** @typedef {{id: number, at: Date, change: Change}} Seen */

/** Whether changes arrive. */
export const connection = signal(/** @type {"connecting" | "live" | "lost"} */ ("connecting"));
/** What this tab has seen change, the newest first. */
export const seen = signal(/** @type {Seen[]} */ ([]));

const KEPT = 200;
const LONGEST_PAUSE_MS = 10_000;
const NAME = "agent-state-events";

/** @type {Set<(change: Change | null) => void>} */
const listeners = new Set();
let count = 0;

/**
 * Call a function at every change, and with null when changes may have been missed.
 * @param {(change: Change | null) => void} listener
 */
export function onChange(listener) {
  listeners.add(listener);
  return () => void listeners.delete(listener);
}

/**
 * Something of the stream: `open` (changes arrive), `lost`, or an event of the server's. To the other
 * tabs it has the id `from` which it follows.
 * @typedef {{name: string, id?: string | null, from?: string | null, data?: Change}} Word
 */

/** The id of the last event that this tab knows of: what its first data go up to, or a later one. */
let last = /** @type {string | null} */ (null);

/** @param {Word} word */
function take({ name, id, data }) {
  connection.value = name === "lost" ? name : "live";
  last = id || last;
  if (data) {
    const change = name === "gone" ? { ...data, revision: null } : data;
    seen.value = [{ id: ++count, at: new Date(), change }, ...seen.peek()].slice(0, KEPT);
    for (const listener of [...listeners]) listener(change);
  } else if (name === "ready" || name === "reset") {
    for (const listener of [...listeners]) listener(null); // something may have changed before
  }
}

/** Whether events lie between what this tab knows of and this id. @param {string | null} [id] */
function isBehind(id) {
  const [server, number] = (last ?? "").split("-");
  const [theirs, from] = (id ?? "").split("-");
  return server !== theirs || Number(number) < Number(from);
}

/**
 * The stream itself, from the last event on. The browser reconnects, and sends the last id; after an
 * answer that is none of a stream it gives up, so a new one is opened, a little later each time.
 * @param {(word: Word) => void} tell
 */
function open(tell) {
  let pause = 500;
  const connect = () => {
    const stream = new EventSource(`api/events${last ? `?since=${encodeURIComponent(last)}` : ""}`);
    for (const name of ["ready", "reset", "change", "gone"]) {
      stream.addEventListener(name, (event) => {
        pause = 500;
        const { data, lastEventId: id } = /** @type {MessageEvent} */ (event);
        tell(name === "ready" || name === "reset" ? { name, id } : { name, id, data: JSON.parse(data) });
      });
    }
    stream.onopen = () => tell({ name: "open" });
    stream.onerror = () => {
      tell({ name: "lost" });
      if (stream.readyState !== EventSource.CLOSED) return;
      setTimeout(connect, pause);
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    };
  };
  connect();
}

let started = false;

/** Begin to follow changes; a second call does nothing. */
export async function follow() {
  if (started) return;
  started = true;
  last = await eventId;
  if (!navigator.locks || !window.BroadcastChannel) {
    open(take); // a page without TLS on another host has no locks
    return;
  }
  const channel = new BroadcastChannel(NAME);
  let leads = false;
  /** @param {Word} word */
  const tell = (word) => channel.postMessage({ from: last, ...word });
  channel.onmessage = ({ data }) => {
    if (data.name === "hello") {
      if (leads) tell({ name: connection.peek() === "live" ? "open" : "lost" });
      return;
    }
    if (data.name !== "lost" && isBehind(data.from)) take({ name: "reset" });
    take(data);
  };
  channel.postMessage({ name: "hello" });
  navigator.locks.request(`${NAME} ${new URL(".", document.baseURI).pathname}`, () => {
    leads = true;
    open((word) => {
      tell(word);
      take(word);
    });
    return new Promise(() => {}); // held until the tab closes
  });
}
