// @ts-check
/**
 * Live changes, over one event stream for all tabs: the tab that holds the lock opens it, and tells
 * the others. A browser permits six connections to a server, and a stream takes one.
 */
import { signal } from "./vendor/signals.mjs";

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

/** @param {{name: string, data?: Change}} event */
function take({ name, data }) {
  if (name === "lost") {
    connection.value = "lost";
    return;
  }
  // Between a page's first request and the first event, too, something may have changed.
  const missed = name === "reset" || (name === "ready" && connection.peek() !== "live");
  connection.value = "live";
  if (data) {
    const change = name === "gone" ? { ...data, revision: null } : data;
    seen.value = [{ id: ++count, at: new Date(), change }, ...seen.peek()].slice(0, KEPT);
    for (const listener of [...listeners]) listener(change);
  } else if (missed) {
    for (const listener of [...listeners]) listener(null);
  }
}

/**
 * The stream itself. The browser reconnects, and sends the last id; after an answer that is none of
 * a stream it gives up, so a new one is opened, a little later each time.
 * @param {(event: {name: string, data?: Change}) => void} tell
 */
function open(tell) {
  let pause = 500;
  const connect = () => {
    const stream = new EventSource("api/events");
    for (const name of ["ready", "reset", "change", "gone"]) {
      stream.addEventListener(name, (event) => {
        pause = 500;
        const data = JSON.parse(/** @type {MessageEvent} */ (event).data);
        tell(name === "ready" || name === "reset" ? { name } : { name, data });
      });
    }
    stream.onopen = () => tell({ name: "ready" });
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
export function follow() {
  if (started) return;
  started = true;
  if (!navigator.locks || !window.BroadcastChannel) {
    open(take); // a page without TLS on another host has no locks
    return;
  }
  const channel = new BroadcastChannel(NAME);
  let leads = false;
  channel.onmessage = ({ data }) => {
    if (data.name !== "hello") take(data);
    else if (leads) channel.postMessage({ name: connection.peek() === "live" ? "ready" : "lost" });
  };
  channel.postMessage({ name: "hello" });
  navigator.locks.request(`${NAME} ${new URL(".", document.baseURI).pathname}`, () => {
    leads = true;
    if (connection.peek() === "live") take({ name: "reset" }); // the former leader is gone
    open((event) => {
      take(event);
      channel.postMessage(event);
    });
    return new Promise(() => {}); // held until the tab closes
  });
}
