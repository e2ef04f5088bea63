// @ts-check
/**
 * What the overview shows at first, while the other scripts are on their way: the server has put it
 * into the page, or it is asked for.
 */

const PATH = "api/summary";
const isOverview = location.hash.replace(/^#\/?/, "").split("?")[0] === "";
const sent = /** @type {HTMLMetaElement | null} */ (document.querySelector('meta[name="summary"]'));
// The server cannot see the place, so its overview is hidden for a moment, until this is known.
document.documentElement.classList.add(isOverview ? "here" : "elsewhere");

/** Load the other scripts, which the server has put aside where it has drawn the overview. */
function load() {
  const aside = document.getElementById("scripts");
  if (aside instanceof HTMLTemplateElement) document.head.append(aside.content);
  else addEventListener("DOMContentLoaded", load, { once: true }); // it has not arrived
}
if (sent) {
  if (!isOverview || document.hidden) load();
  else requestAnimationFrame(() => setTimeout(load)); // what is there is drawn first
}

/** @type {any} */
let given = isOverview && sent ? JSON.parse(sent.content) : undefined;
/** @type {Promise<Response> | null} */
let early = isOverview && !sent ? fetch(PATH) : null;

/** The id of the event that the first data go up to; null without one. Never rejects. @type {Promise<string | null>} */
export const eventId = Promise.resolve(early ?? (isOverview ? sent?.dataset.event : null) ?? null).then(
  (found) => (found instanceof Response ? found.headers.get("Last-Event-ID") : found),
  () => null, // who takes the answer says so
);

/** The data of this path that came with the page, once. @param {string | null} path */
export function takeGiven(path) {
  if (path !== PATH) return undefined;
  const found = given;
  given = undefined;
  return found;
}

/** The early answer to a GET of this path, once; otherwise null. @param {string} path */
export function takeEarly(path) {
  if (path !== PATH) return null;
  const found = early;
  early = null;
  return found;
}
