// @ts-check
/** Requests to the HTTP API. All paths are relative, so that the page works behind a prefix. */
import { takeEarly } from "./first.js";

/** An error of the API, or `network` when no answer came. */
export class ApiError extends Error {
  /** @param {number} status @param {string} code @param {string} detail */
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

/**
 * One request. Resolves to the answer; throws an `ApiError`.
 * @param {string} method
 * @param {string} path relative, such as `api/summary`
 * @param {{body?: unknown, headers?: Record<string, string>}} [options]
 * @returns {Promise<{status: number, etag: string | null, body: any}>}
 */
export async function request(method, path, { body, headers = {} } = {}) {
  let response;
  try {
    response = await ((method === "GET" && takeEarly(path)) || fetch(path, {
      method,
      headers: body === undefined ? headers : { ...headers, "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    }));
  } catch {
    throw new ApiError(0, "network", "The server does not answer.");
  }
  const text = response.status === 204 || response.status === 304 ? "" : await read(response);
  if (response.ok || response.status === 304) {
    return { status: response.status, etag: response.headers.get("ETag"), body: parse(text) };
  }
  const problem = parse(text) ?? {};
  const detail = problem.detail || `${response.status} ${response.statusText}`;
  throw new ApiError(response.status, problem.code || "unknown", detail);
}

/** @param {Response} response */
async function read(response) {
  try {
    return await response.text();
  } catch {
    throw new ApiError(0, "network", "The connection broke.");
  }
}

/** @param {string} text */
function parse(text) {
  try {
    return text ? JSON.parse(text) : null;
  } catch {
    return null;
  }
}

/** @param {string} path */
export const get = (path) => request("GET", path);
/** @param {string} path @param {unknown} [body] @param {Record<string, string>} [headers] */
export const post = (path, body, headers) => request("POST", path, { body, headers });

/**
 * A path of the API, with its parts and its query percent-encoded. Empty values are left out.
 * @param {string[]} parts
 * @param {Record<string, string | number | boolean | string[] | null | undefined>} [query]
 */
export function api(parts, query = {}) {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") search.append(name, String(one));
    }
  }
  const text = search.toString();
  return ["api", ...parts.map(encodeURIComponent)].join("/") + (text ? `?${text}` : "");
}
