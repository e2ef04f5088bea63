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

/** A client of one server. */
export function createClient({ baseUrl = "", token, fetch }: ClientOptions = {}): Client {
  return createFetchClient<paths>({
    baseUrl,
    fetch: (request: Request) => {
      const bearer = typeof token === "function" ? token() : token;
      if (bearer) request.headers.set("Authorization", `Bearer ${bearer}`);
      return (fetch ?? globalThis.fetch)(request);
    },
  });
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
