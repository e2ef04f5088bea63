// @ts-check
/** The place in the page, kept in the fragment of its address: `#/tasks?status=dead`. */
import { signal } from "./vendor/libraries.mjs";

/** @typedef {{parts: string[], query: URLSearchParams}} Place */

/** @param {string} hash @returns {Place} */
function parse(hash) {
  const [path = "", search = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").filter(Boolean).map(decode);
  return { parts, query: new URLSearchParams(search) };
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a person wrote it
  }
}

export const place = signal(parse(location.hash));
addEventListener("hashchange", () => {
  place.value = parse(location.hash);
});

/**
 * The address of a place. Empty values are left out.
 * @param {string[]} parts
 * @param {Record<string, string | null | undefined>} [query]
 */
export function to(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value);
  const search = new URLSearchParams(/** @type {[string, string][]} */ (given)).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${search ? `?${search}` : ""}`;
}

/** @param {string} address @param {{replace?: boolean}} [options] */
export function go(address, { replace = false } = {}) {
  if (!replace) {
    location.hash = address;
    return;
  }
  history.replaceState(null, "", address);
  place.value = parse(address);
}

/**
 * Change the query of the current place.
 * @param {Record<string, string | null>} change null removes
 * @param {{replace?: boolean}} [options]
 */
export function requery(change, options) {
  const { parts, query } = place.peek();
  go(to(parts, { ...Object.fromEntries(query), ...change }), options);
}
