/**
 * The session of a page: loaded by its token, kept as the server has it, changed at once.
 *
 * A store knows no framework. `getSnapshot` returns one immutable value, and `subscribe` tells when
 * there is another one.
 */

import { type Calls, type ClientOptions, createCalls, patience, unwrap } from "./client.js";
import { AgentStateError } from "./error.js";
import { firstNumber, isSame, kept, lastNumber, merged, type SessionMessage } from "./messages.js";
import { delayAfter, pause } from "./pause.js";
import type { components } from "./schema.js";
import { followTogether } from "./tabs.js";

type Schemas = components["schemas"];

/** A session, as the server returns it. */
export type Session = Schemas["Session"];
/** A JSON object. */
export type JsonObject = Record<string, unknown>;

/**
 * `no_session`: there is no token, or the server does not know it. `creating`: `getToken` is being
 * asked. `validating`: the session is loaded for the first time. `expired`: it has ended on the
 * server. `error`: it could not be loaded, and there is nothing to show.
 */
export type SessionStatus =
  | "no_session"
  | "creating"
  | "validating"
  | "active"
  | "expired"
  | "error";

/** A workflow of an orchestrator. */
export type Workflow = Schemas["OrchestratorWorkflow"];
/** The workflows, services and hand-overs behind a session. */
export type OrchestratorContext = Schemas["OrchestratorContext"];

/** A message that the server has not confirmed yet. */
export interface PendingMessage {
  /** Its idempotency key, the same at every attempt. */
  readonly key: string;
  readonly agent: string;
  readonly content: unknown;
  /** The failed attempts so far, and why the latest one failed. */
  readonly failures: number;
  readonly error: AgentStateError | null;
}

/** A conversation with the messages that were loaded, oldest first, without holes. */
export interface ConversationState
  extends Pick<
    Schemas["Conversation"],
    "conversation_id" | "message_count" | "last_message_at" | "orchestrator_context"
  > {
  readonly messages: readonly SessionMessage[];
}

/** What a page shows of its session. */
export interface SessionSnapshot {
  readonly sessionStatus: SessionStatus;
  readonly session: Session | null;
  /** What failed last; null once it works again. The data stay as they were. */
  readonly error: AgentStateError | null;
  /** The session is being loaded for the first time. */
  readonly isLoading: boolean;
  /** It is known whether there is a session. */
  readonly isInitialized: boolean;
  /** The time of the latest change, by the server's clock. */
  readonly lastActivity: string | null;
  /** The session's state, with the changes that are still on their way. */
  readonly state: JsonObject;
  readonly orchestratorStates: Readonly<Record<string, string>>;
  readonly orchestratorContext: OrchestratorContext | null;
  readonly conversations: Readonly<Record<string, ConversationState>>;
  readonly pending: readonly PendingMessage[];
}

export interface SessionOptions extends Omit<ClientOptions, "token"> {
  /**
   * The session's token. null: there is none, and nothing is requested. undefined: `getToken` is
   * asked, or the browser's cookie is used.
   */
  token?: string | null | undefined;
  /** Gets the token, such as from the backend of the page. It is asked once. */
  getToken?: (() => Promise<string | null> | string | null) | undefined;
  /** Follow changes as they happen; true by default. */
  live?: boolean | undefined;
  /** The latest messages of each conversation that are loaded at first; 20 by default. */
  messages?: number | undefined;
}

export interface SendOptions {
  /** The idempotency key; a random one by default. */
  key?: string | undefined;
  /** Gives up when it ends. */
  signal?: AbortSignal | undefined;
  metadata?: JsonObject | undefined;
  orchestrator_context?: JsonObject | undefined;
}

interface Patch {
  patch: JsonObject;
  mode: "merge" | "replace";
}

/** All that belongs to one token; another token is another visit. */
interface Visit {
  readonly token: string | undefined;
  /** Ends everything of this visit. */
  readonly end: AbortController;
  readonly queues: Map<string, Promise<unknown>>;
  patches: Patch[];
  /** Loads and changes take turns, so that no older answer follows a newer one. */
  turn: Promise<unknown>;
  /** A load that has not begun. */
  next?: Promise<void> | undefined;
  /** Ends the stream; undefined without one. */
  stream?: AbortController | undefined;
  failures: number;
  ends: number;
}

const NOTHING = {
  session: null,
  error: null,
  lastActivity: null,
  state: {},
  orchestratorStates: {},
  orchestratorContext: null,
  conversations: {},
  pending: [],
} as const;

/** A snapshot whose flags say what its status does. */
const flagged = (
  snapshot: Omit<SessionSnapshot, "isLoading" | "isInitialized">,
): SessionSnapshot => {
  const isLoading = ["creating", "validating"].includes(snapshot.sessionStatus);
  return { ...snapshot, isLoading, isInitialized: !isLoading };
};

const without = (sessionStatus: SessionStatus) => flagged({ ...NOTHING, sessionStatus });

export class SessionStore {
  /** Calls with the session's token. */
  readonly client: Calls;
  #options: SessionOptions;
  readonly #listeners = new Set<() => void>();
  #snapshot: SessionSnapshot;
  #visit: Visit | undefined;
  /** The token that was given last, and the answer of `getToken`. */
  #given: string | null | undefined;
  #asked: Promise<string | null> | undefined;
  #isCleared = false;
  /** Ends the stream; undefined while the store is stopped. */
  #running: AbortController | undefined;

  /** Nothing is requested before `start`. */
  constructor(options: SessionOptions = {}) {
    this.#options = options;
    this.client = createCalls({ ...options, token: () => this.#visit?.token });
    this.#given = options.token;
    const { token, getToken } = options;
    this.#snapshot = without(
      token === null ? "no_session" : token === undefined && getToken ? "creating" : "validating",
    );
  }

  /** Call `listener` after each change. Returns the function that ends this. */
  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  readonly getSnapshot = (): SessionSnapshot => this.#snapshot;

  /** Another object for each token; undefined while there is none, and nothing may be requested. */
  readonly getVisit = (): object | undefined => this.#visit;

  /** Load the session and follow it; `options` change those of the constructor. */
  start(options: SessionOptions = {}): void {
    this.#options = { ...this.#options, ...options };
    this.stop();
    this.#running = new AbortController();
    const { token } = this.#options;
    if (token !== this.#given) {
      this.#given = token;
      this.#isCleared = false;
      this.#leave("validating");
    }
    if (this.#visit) void this.#load(this.#visit);
    else if (token === null || this.#isCleared) this.#leave("no_session");
    else if (token === undefined && this.#options.getToken) this.#ask(this.#options.getToken);
    else this.#enter(token);
  }

  /** End the stream. Messages that are on their way are still sent. */
  stop(): void {
    this.#running?.abort();
    this.#running = undefined;
    unfollow(this.#visit);
  }

  #ask(getToken: () => Promise<string | null> | string | null): void {
    const running = this.#running;
    this.#set(without("creating"));
    this.#asked ??= (async () => getToken())();
    this.#asked.then(
      (token) => {
        if (running !== this.#running || this.#visit) return;
        if (token === null) this.#set(without("no_session"));
        else this.#enter(token);
      },
      (error) => {
        this.#asked = undefined;
        if (running !== this.#running || this.#visit) return;
        this.#set({ ...without("error"), error: AgentStateError.from(error) });
      },
    );
  }

  #enter(token: string | undefined): void {
    this.#visit?.end.abort();
    this.#isCleared = false;
    this.#visit = {
      token,
      end: new AbortController(),
      queues: new Map(),
      patches: [],
      turn: Promise.resolve(),
      failures: 0,
      ends: 0,
    };
    this.#set(without("validating"));
    void this.#load(this.#visit);
  }

  #leave(status: SessionStatus): void {
    this.#visit?.end.abort();
    this.#visit = undefined;
    this.#set(without(status));
  }

  // -- loading ---------------------------------------------------------------------------------

  /** Load the session after what is going on now. One load serves all that ask before it begins. */
  #load(visit: Visit): Promise<void> {
    visit.next ??= this.#inTurn(visit, async () => {
      visit.next = undefined;
      try {
        const query = { messages: this.#options.messages ?? 20 };
        const signal = patience(visit.end.signal);
        const session = await unwrap(
          this.client.GET("/api/global/session", { params: { query }, signal }),
        );
        await this.#take(visit, session);
        visit.failures = 0;
        void this.#follow(visit, session.session_id);
      } catch (error) {
        this.#fail(visit, error);
      }
    });
    return visit.next;
  }

  /** Follow the changes of the session, unless they are followed. */
  async #follow(visit: Visit, session_id: string): Promise<void> {
    const running = this.#running;
    if (this.#visit !== visit || !running || this.#options.live === false) return;
    if (visit.stream) return;
    visit.stream = new AbortController();
    const ends = AbortSignal.any([visit.stream.signal, visit.end.signal]);
    await followTogether(
      `agent-state ${this.#options.baseUrl ?? ""} ${session_id}`,
      {
        open: (last, signal) =>
          unwrap(
            this.client.GET("/api/global/session/{session_id}/events", {
              params: { path: { session_id }, header: last ? { "last-event-id": last } : {} },
              parseAs: "stream",
              signal,
            }),
          ) as Promise<ReadableStream<Uint8Array>>,
        onEvent: () => void this.#load(visit),
        onError: (error) => {
          if (this.#visit !== visit) return;
          if (error) this.#set({ error });
          else if (this.#snapshot.error) void this.#load(visit);
        },
      },
      ends,
    );
    // The server refuses the stream: the load says why. If the session is there, follow it again.
    await pause(delayAfter(visit.ends++), ends);
    if (ends.aborted) return;
    visit.stream = undefined;
    void this.#load(visit);
  }

  async #settled(): Promise<void> {
    await this.#visit?.turn;
  }

  #inTurn<T>(visit: Visit, work: () => Promise<T>): Promise<T> {
    const done = visit.turn.then(work);
    visit.turn = done.catch(() => undefined);
    return done;
  }

  #fail(visit: Visit, cause: unknown): void {
    if (this.#visit !== visit) return;
    const error = AgentStateError.from(cause);
    const [running, snapshot] = [this.#running, this.#snapshot];
    if (error.status === 401 || error.status === 404) {
      unfollow(visit);
      this.#set(without("no_session"));
    } else if (error.status === 410) {
      unfollow(visit);
      this.#set({ sessionStatus: "expired", error: null });
    } else {
      const sessionStatus = snapshot.session ? snapshot.sessionStatus : "error";
      this.#set({ sessionStatus, error });
      if (!error.isPassing || !running || this.#options.live === false) return;
      pause(delayAfter(visit.failures++, error), running.signal).then(() => {
        if (this.#running === running && this.#visit === visit) void this.#load(visit);
      });
    }
  }

  /** Show what the server returned, after the messages that it leaves out are loaded. */
  async #take(visit: Visit, session: Session): Promise<void> {
    const conversations: Record<string, ConversationState> = {};
    for (const [agent, view] of Object.entries(session.conversations)) {
      const { messages, message_count: count } = view;
      const before = this.#snapshot.conversations[agent];
      let known = before?.messages ?? [];
      if (lastNumber(known) > count) known = []; // the log was written anew
      const last = lastNumber(known);
      const follows = messages.length > 0 && firstNumber(messages) <= last + 1;
      if (known.length && last < count && !follows) {
        known = merged(known, await this.#since(visit, session.session_id, agent, last));
      }
      known = merged(known, messages);
      const now = { ...view, messages: known };
      conversations[agent] =
        before?.messages === known && isSame({ ...before, messages: [] }, { ...now, messages: [] })
          ? before
          : now;
    }
    if (this.#visit !== visit) return;
    this.#show(visit, {
      session,
      sessionStatus: "active",
      error: null,
      lastActivity: session.last_activity,
      orchestratorStates: (session.orchestrator_states ?? {}) as Record<string, string>,
      orchestratorContext: kept(
        this.#snapshot.orchestratorContext,
        session.orchestrator_context ?? null,
      ),
      conversations,
    });
  }

  /** Set the snapshot with its state, and without the pending messages that are among the others. */
  #show(visit: Visit, change: Partial<SessionSnapshot>): void {
    const next = { ...this.#snapshot, ...change };
    const state = visit.patches.reduce<JsonObject>(
      (before, { patch, mode }) => (mode === "merge" ? deepMerge(before, patch) : patch),
      next.session?.state ?? {},
    );
    const pending = next.pending.filter(
      ({ agent, key }) =>
        !next.conversations[agent]?.messages.some((message) => message.dedupe_key === key),
    );
    this.#set({
      ...next,
      state: kept(this.#snapshot.state, state),
      pending: kept(next.pending, pending),
    });
  }

  #set(change: Partial<SessionSnapshot>): void {
    this.#snapshot = flagged({ ...this.#snapshot, ...change });
    for (const listener of this.#listeners) listener();
  }

  /** All messages after a number. */
  async #since(
    visit: Visit,
    session_id: string,
    agent_type: string,
    last: number,
  ): Promise<readonly SessionMessage[]> {
    let found: readonly SessionMessage[] = [];
    for (let after: number | null | undefined = last; after != null; ) {
      const page: Schemas["ConversationPage"] = await this.#page(visit, session_id, agent_type, {
        after,
        limit: 1000,
      });
      found = merged(found, page.messages);
      after = page.next_after;
    }
    return found;
  }

  #page(
    visit: Visit,
    session_id: string,
    agent_type: string,
    query: { after?: number; before?: number; limit: number },
  ): Promise<Schemas["ConversationPage"]> {
    const path = "/api/global/session/{session_id}/conversations/{agent_type}/messages";
    return unwrap(
      this.client.GET(path, {
        params: { path: { session_id, agent_type }, query },
        signal: patience(visit.end.signal),
      }),
    );
  }

  /** The visit and the id of its session. Throws without a session. */
  #here(): [Visit, string] {
    const [visit, snapshot] = [this.#visit, this.#snapshot];
    if (visit && snapshot.session) return [visit, snapshot.session.session_id];
    throw new AgentStateError("not_found", "there is no session");
  }

  // -- what a page does ------------------------------------------------------------------------

  /** Whether the server knows the session, as far as is known here. */
  readonly isSessionValid = (): boolean => this.#snapshot.sessionStatus === "active";

  /** Minutes since the session was created; 0 without a session. */
  readonly getSessionAge = (): number => {
    const { session } = this.#snapshot;
    return session ? Math.max(0, (Date.now() - Date.parse(session.created_at)) / 60_000) : 0;
  };

  /** Go on with the session of this token. Returns what has become of it. */
  readonly initializeSession = async (token: string): Promise<SessionStatus> => {
    this.#running ??= new AbortController();
    this.#enter(token);
    await this.#settled();
    return this.#snapshot.sessionStatus;
  };

  /** Load the session again; a failure is in `error`. */
  readonly refreshSession = async (): Promise<void> => {
    if (this.#visit) return this.#load(this.#visit);
    if (this.#running) this.start();
    await this.#asked?.catch(() => undefined);
    await this.#settled();
  };

  /** Forget the token and the session. What is stored on the server stays. */
  readonly clearSession = (): void => {
    this.#asked = undefined;
    this.#isCleared = true;
    this.#leave("no_session");
  };

  /** Renew the session's expiry; a failure is in `error`. */
  readonly updateLastActivity = async (): Promise<void> => {
    const [visit, session_id] = this.#here();
    await this.#inTurn(visit, async () => {
      try {
        await this.#take(
          visit,
          await unwrap(
            this.client.POST("/api/global/session/{session_id}/touch", {
              params: { path: { session_id } },
              signal: patience(visit.end.signal),
            }),
          ),
        );
      } catch (error) {
        this.#fail(visit, error);
      }
    });
  };

  /**
   * Change the session's state: shown at once, and taken back if it fails. `merge` changes objects
   * at every depth, `replace` the whole state. Rejects with an `AgentStateError`.
   */
  readonly updateSessionState = async (
    patch: JsonObject,
    mode: "merge" | "replace" = "merge",
  ): Promise<void> => {
    const [visit, session_id] = this.#here();
    const change = { patch, mode };
    visit.patches.push(change);
    this.#show(visit, {});
    await this.#inTurn(visit, async () => {
      const settle = () => {
        visit.patches = visit.patches.filter((one) => one !== change);
      };
      try {
        const session = await unwrap(
          this.client.PATCH("/api/global/session/{session_id}", {
            params: { path: { session_id } },
            body: { state: patch, mode },
            signal: patience(visit.end.signal),
          }),
        );
        settle();
        await this.#take(visit, session);
      } catch (error) {
        settle();
        if (this.#visit === visit) {
          this.#show(visit, {});
          void this.#load(visit); // it may have been carried out
        }
        throw error;
      }
    });
  };

  /**
   * Send a message to an agent. It is sent again with the same key, for as long as the network or
   * the server fails for a while; messages of one conversation keep their order. Resolves with the
   * stored message. Rejects with an `AgentStateError` if the server refuses it.
   */
  readonly sendMessage = async (
    agent: string,
    content: unknown,
    { key = randomKey(), signal, ...more }: SendOptions = {},
  ): Promise<SessionMessage> => {
    const [visit, session_id] = this.#here();
    const ends = signal ? AbortSignal.any([signal, visit.end.signal]) : visit.end.signal;
    this.#set({
      pending: [...this.#snapshot.pending, { key, agent, content, failures: 0, error: null }],
    });
    const before = visit.queues.get(agent);
    const sent = (async () => {
      await before?.catch(() => undefined);
      for (let failures = 0; ; ) {
        if (ends.aborted) throw new AgentStateError("cancelled", "the message was not sent");
        try {
          const { message } = await unwrap(
            this.client.POST(
              "/api/global/session/{session_id}/conversations/{agent_type}/messages",
              {
                params: {
                  path: { session_id, agent_type: agent },
                  header: { "idempotency-key": key },
                },
                body: { content, ...more } as Schemas["NewSessionMessage"],
                signal: patience(ends),
              },
            ),
          );
          return message;
        } catch (cause) {
          const error = AgentStateError.from(cause);
          if (!error.isPassing) throw error;
          if (ends.aborted) continue;
          failures += 1;
          this.#setPending(visit, key, { failures, error });
          await pause(delayAfter(failures - 1, error), ends);
        }
      }
    })();
    visit.queues.set(agent, sent);
    try {
      const message = await sent;
      await this.#add(visit, agent, message);
      return message;
    } catch (error) {
      if ([401, 404, 410].includes((error as AgentStateError).status)) void this.#load(visit);
      throw error;
    } finally {
      this.#setPending(visit, key);
    }
  };

  /** Add a message that follows those that are known; others come with a load. */
  async #add(visit: Visit, agent: string, message: SessionMessage): Promise<void> {
    if (this.#visit !== visit) return;
    const conversation = this.#snapshot.conversations[agent];
    const seq = message.seq ?? 0;
    if (!conversation || lastNumber(conversation.messages) + 1 < seq) return this.#load(visit);
    const messages = merged(conversation.messages, [message]);
    const message_count = Math.max(conversation.message_count, seq);
    this.#show(visit, {
      conversations: {
        ...this.#snapshot.conversations,
        [agent]: { ...conversation, messages, message_count },
      },
    });
  }

  /** Change a pending message, or remove it. */
  #setPending(visit: Visit, key: string, change?: Partial<PendingMessage>): void {
    if (this.#visit !== visit) return;
    const pending = this.#snapshot.pending.flatMap((one) =>
      one.key !== key ? [one] : change ? [{ ...one, ...change }] : [],
    );
    this.#set({ pending });
  }

  /** Load earlier messages of a conversation. Returns whether there are still earlier ones. */
  readonly loadEarlier = async (agent: string, limit = 50): Promise<boolean> => {
    const [visit, session_id] = this.#here();
    return this.#inTurn(visit, async () => {
      const known = this.#snapshot.conversations[agent]?.messages ?? [];
      const before = firstNumber(known);
      const page = await this.#page(
        visit,
        session_id,
        agent,
        before ? { before, limit } : { limit },
      );
      const conversation = this.#snapshot.conversations[agent];
      if (this.#visit === visit && conversation) {
        const messages = merged(page.messages, conversation.messages);
        this.#show(visit, {
          conversations: {
            ...this.#snapshot.conversations,
            [agent]: { ...conversation, messages },
          },
        });
      }
      return page.next_before != null;
    });
  };
}

function unfollow(visit: Visit | undefined): void {
  visit?.stream?.abort();
  if (visit) visit.stream = undefined;
}

/** `patch` merged into `old`: objects at every depth, other values replace. */
function deepMerge(old: JsonObject, patch: JsonObject): JsonObject {
  const result = { ...old };
  for (const [name, value] of Object.entries(patch)) {
    const before = result[name];
    result[name] = isObject(before) && isObject(value) ? deepMerge(before, value) : value;
  }
  return result;
}

function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A key that no other message has; `crypto.randomUUID` exists under HTTPS only. */
function randomKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
