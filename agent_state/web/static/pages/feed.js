// @ts-check
/** Changes in words. */
import { documentPlace, html, When } from "../ui.js";
import { to } from "../router.js";

/** @typedef {{kind: string, key: string[], revision: number | null, outside: boolean}} Change */

const NAMES = /** @type {Record<string, string>} */ ({
  agents: "Agent",
  tasks: "Task",
  mail: "Mail",
  sleep: "The sleep of",
  sessions: "Session",
  journeys: "Journey",
  leases: "The lease of",
});

/** The page of what a change is about. @param {string} kind @param {string[]} key */
export function placeOf(kind, key) {
  if ((kind === "agents" || kind === "sessions") && key.length === 1) return to([kind, ...key]);
  if (["tasks", "mail", "journeys"].includes(kind) && key.length === 2) return to([kind, ...key]);
  return documentPlace(kind, key);
}

/** @param {{change: Change}} props */
export function Sentence({ change: { kind, key, revision, outside } }) {
  const name = NAMES[kind] ?? kind;
  const what = revision === null ? "was removed" : revision === 1 ? "was created" : "changed";
  return html`${name} <a href=${placeOf(kind, key)}>${key.join(" / ")}</a> ${what}${
    revision !== null && revision > 1 && html` <span class="none">(revision ${revision})</span>`
  }${outside && ", by another process or a person"}`;
}

/** @param {{changes: {id: number | string, at?: Date, change: Change}[]}} props */
export const Feed = ({ changes }) =>
  changes.length
    ? html`<ol class="feed">${changes.map(
        ({ id, at, change }) => html`<li key=${id}>${at && html`<${When} at=${at.toISOString()} /> `}<${Sentence} change=${change} /></li>`,
      )}</ol>`
    : html`<p class="empty">Nothing has changed since this page was opened.</p>`;
