// @ts-check
/** Asks for what the overview shows while the other scripts are still on their way. */

const PATH = "api/summary";
const isOverview = location.hash.replace(/^#\/?/, "").split("?")[0] === "";

/** @type {Promise<Response> | null} */
let early = isOverview ? fetch(PATH) : null;

/** The id of the event that the early answer goes up to; null without one. Never rejects. */
export const eventId = Promise.resolve(early).then(
  (answer) => answer && answer.headers.get("Last-Event-ID"),
  () => null, // who takes the answer says so
);

/** The early answer to a GET of this path, once; otherwise null. @param {string} path */
export function takeEarly(path) {
  if (path !== PATH) return null;
  const found = early;
  early = null;
  return found;
}
