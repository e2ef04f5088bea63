/** Typed calls of the operations in the server's openapi.json. */

import createFetchClient, { type Client as FetchClient } from "openapi-fetch";
import { AgentStateError } from "./error.js";
import type { paths } from "./schema.js";

/** Calls every operation by its method and path, with typed parameters and results. */
export type Client = FetchClient<paths>;

export interface ClientOptions {
  /** The address of the server, such as `https://example.org/state`; that of the page by default. */
  baseUrl?: string | undefined;
  /** The token of an operator or of a session; a function is asked before each call. */
  token?: string | null | undefined | (() => string | null | undefined);
  /** Instead of the global `fetch`. */
  fetch?: ((request: Request) => Promise<Response>) | undefined;
}

/** Sends a request with the token. */
function sending({ token, fetch }: ClientOptions): (request: Request) => Promise<Response> {
  return (request) => {
    const bearer = typeof token === "function" ? token() : token;
    if (bearer) request.headers.set("Authorization", `Bearer ${bearer}`);
    return (fetch ?? globalThis.fetch)(request);
  };
}

/** A client of one server. */
export function createClient(options: ClientOptions = {}): Client {
  return createFetchClient<paths>({ baseUrl: options.baseUrl ?? "", fetch: sending(options) });
}

/** What the stores need of a `Client`. */
export type Calls = Pick<Client, "GET" | "POST" | "PATCH">;

interface Call {
  params?: {
    path?: Record<string, string>;
    query?: Record<string, unknown>;
    header?: Record<string, string>;
  };
  body?: unknown;
  parseAs?: "stream";
  signal?: AbortSignal;
}

/**
 * These calls without openapi-fetch, whose 2 kB are more than a third of what a page with hooks would
 * load. They are typed by it.
 */
export function createCalls(options: ClientOptions = {}): Calls {
  const send = sending(options);
  const base = (options.baseUrl ?? "").replace(/\/$/, "");
  const calls = (method: string) => async (path: string, call: Call) => {
    const { params: { path: ids, query, header } = {}, body, parseAs, signal } = call;
    const search = new URLSearchParams();
    for (const [name, value] of Object.entries(query ?? {})) {
      for (const one of [value].flat()) search.append(name, `${one}`);
    }
    const request = new Request(
      `${base}${path.replace(/{(.+?)}/g, (_, name) => encodeURIComponent(ids?.[name] ?? ""))}${query ? `?${search}` : ""}`,
      {
        method,
        headers: { ...header, ...(body ? { "Content-Type": "application/json" } : {}) },
        ...(body ? { body: JSON.stringify(body) } : {}),
        ...(signal ? { signal } : {}),
      },
    );
    const response = await send(request);
    if (!response.ok) return { error: await response.json().catch(() => undefined), response };
    return { data: parseAs ? response.body : await response.json(), response };
  };
  return { GET: calls("GET"), POST: calls("POST"), PATCH: calls("PATCH") } as unknown as Calls;
}

type Answer<T> = { data?: T; error?: unknown; response: Response };

/** The result of a call of a `Client`. Throws `AgentStateError`, and nothing else. */
export async function unwrap<T>(call: Promise<Answer<T>>): Promise<T> {
  let answer: Answer<T>;
  try {
    answer = await call;
  } catch (error) {
    throw AgentStateError.from(error);
  }
  if (!answer.response.ok) throw AgentStateError.of(answer.response, answer.error);
  return answer.data as T;
}

/** How long a call may take, in milliseconds, before it counts as a failure of the network. */
const PATIENCE = 30_000;

/** A signal that ends one call: with `signal`, or when it takes too long. */
export function patience(signal: AbortSignal): AbortSignal {
  return AbortSignal.any([signal, AbortSignal.timeout(PATIENCE)]);
}
