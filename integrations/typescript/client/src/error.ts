/** The error of a call, from the server's problem details (RFC 9457). */

import type { components } from "./schema.js";

/** A field of a request that is not valid: where it is, and what is wrong with it. */
export type FieldError = components["schemas"]["InvalidField"];

/** The server's words for an error, and those of the client. */
export type ErrorCode =
  | components["schemas"]["ProblemCode"]
  | "network"
  | "cancelled"
  | "unexpected";

interface Facts {
  status?: number;
  errors?: readonly FieldError[] | undefined;
  retryAfter?: number | undefined;
  cause?: unknown;
}

/** A call that failed. Programs read `code`, people read `message`. */
export class AgentStateError extends Error {
  override readonly name = "AgentStateError";
  /** The HTTP status; 0 when nothing came. */
  readonly status: number;
  /**
   * The server's word for the error, such as `ended`. Words of the client's own: `network` (nothing
   * came, or not all of it), `cancelled` (the session was left before), `unexpected` (an answer that
   * is not agent_state's).
   */
  readonly code: ErrorCode;
  /** The fields that are not valid. */
  readonly errors?: readonly FieldError[] | undefined;
  /** The seconds after which the server can be asked again. */
  readonly retryAfter?: number | undefined;

  constructor(
    code: ErrorCode,
    message: string,
    { status = 0, errors, retryAfter, cause }: Facts = {},
  ) {
    super(message, { cause });
    this.code = code;
    this.status = status;
    this.errors = errors;
    this.retryAfter = retryAfter;
  }

  /** The error that a response and its body stand for. */
  static of(response: Response, body: unknown): AgentStateError {
    const { status, statusText } = response;
    const problem = (body ?? {}) as { code?: ErrorCode; detail?: string; errors?: FieldError[] };
    const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
    return new AgentStateError(
      problem.code ?? "unexpected",
      problem.detail ?? `${status} ${statusText}`,
      { status, errors: problem.errors, retryAfter: seconds >= 0 ? seconds : undefined },
    );
  }

  /** Any error as an `AgentStateError`: what a call throws is a failure of the network. */
  static from(error: unknown): AgentStateError {
    if (error instanceof AgentStateError) return error;
    const code = error instanceof SyntaxError ? "unexpected" : "network";
    return new AgentStateError(code, `${(error as Error | undefined)?.message ?? error}`, {
      cause: error,
    });
  }

  /** Whether the same request can succeed later: the network failed, or the server is not ready. */
  get isPassing(): boolean {
    return this.code === "network" || (this.status >= 502 && this.status <= 504);
  }
}
