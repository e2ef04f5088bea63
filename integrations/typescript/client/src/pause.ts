/** Pauses between attempts: twice as long each time, and cut short when the network comes back. */

import type { AgentStateError } from "./error.js";

const FIRST = 250;
const LONGEST = 15_000;

/** Milliseconds before the attempt after `failures` failures: what the server asks for, or twice as long each time. */
export function delayAfter(failures: number, error?: AgentStateError): number {
  if (error?.retryAfter !== undefined) return error.retryAfter * 1000;
  // At random, so that the clients of a server that comes back do not all come at once.
  return Math.min(LONGEST, FIRST * 2 ** failures) * (0.5 + Math.random() / 2);
}

/** Wait so many milliseconds, or until the browser is online again. Never throws; ends with `signal`. */
export function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      globalThis.removeEventListener?.("online", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    signal.addEventListener("abort", done);
    globalThis.addEventListener?.("online", done);
    if (signal.aborted) done();
  });
}
