/** What an operator's page shows: agents and tasks, kept as they are on the server. */

import { type Calls, unwrap } from "./client.js";
import { AgentStateError } from "./error.js";
import type { LiveEvent } from "./events.js";
import { delayAfter, pause } from "./pause.js";
import type { components } from "./schema.js";
import { followTogether } from "./tabs.js";

export type Agent = components["schemas"]["Agent"];
export type Task = components["schemas"]["Task"];

const RESET: LiveEvent = { event: "reset", data: {} };
/** More agents than this that changed are loaded together. */
const MANY = 20;

/** A value that is loaded, and loaded again when it changes. */
export interface Loaded<T> {
  /** The value as it was loaded last; null before. */
  readonly data: T | null;
  readonly error: AgentStateError | null;
  readonly isLoading: boolean;
}

/** Takes an event, or an error of the stream; null: it is open again. */
type Hear = (news: LiveEvent | AgentStateError | null) => void;
type Load<T> = (before: T | null, events: readonly LiveEvent[]) => Promise<T>;

/** The changes of agents and tasks, read while anyone listens, with one stream for all. */
export class OperatorFeed {
  readonly #name: string;
  readonly #listeners = new Set<Hear>();
  #running: AbortController | undefined;

  constructor(
    readonly client: Calls,
    name: string,
  ) {
    this.#name = name;
  }

  /** Call `hear` for all news from now on. Returns the function that ends this. */
  listen(hear: Hear): () => void {
    this.#listeners.add(hear);
    if (!this.#running) {
      this.#running = new AbortController();
      void this.#read(this.#running.signal);
    }
    return () => {
      this.#listeners.delete(hear);
      if (this.#listeners.size) return;
      this.#running?.abort();
      this.#running = undefined;
    };
  }

  #read(signal: AbortSignal): Promise<void> {
    const tell: Hear = (news) => {
      for (const hear of this.#listeners) hear(news);
    };
    return followTogether(
      this.#name,
      {
        open: (last, signal) =>
          unwrap(
            this.client.GET("/api/events", {
              params: {
                query: { kind: ["agents", "tasks"] },
                header: last ? { "last-event-id": last } : {},
              },
              parseAs: "stream",
              signal,
            }),
          ) as Promise<ReadableStream<Uint8Array>>,
        onEvent: tell,
        onError: tell,
      },
      signal,
    );
  }
}

/** Loads a value while anyone subscribes, and again after each event that concerns it. */
export class LiveValue<T> {
  readonly #feed: OperatorFeed | undefined;
  readonly #load: Load<T> | undefined;
  readonly #isMine: (event: LiveEvent) => boolean;
  readonly #listeners = new Set<() => void>();
  #snapshot: Loaded<T>;
  /** Ends the attempts; undefined while nobody subscribes. */
  #running: AbortController | undefined;
  /** The events since the load that is going on began; undefined without one. */
  #news: LiveEvent[] | undefined;

  /**
   * `load` returns the value after some events; `ready` and `reset` mean all of it. `isMine` says
   * whether an event concerns it. Without a feed it is loaded once, and by `refresh`; without
   * `load` it is nothing.
   */
  constructor(
    feed?: OperatorFeed,
    load?: Load<T>,
    isMine: (event: LiveEvent) => boolean = () => false,
  ) {
    this.#feed = feed;
    this.#load = load;
    this.#isMine = isMine;
    this.#snapshot = { data: null, error: null, isLoading: !!load };
  }

  readonly getSnapshot = (): Loaded<T> => this.#snapshot;

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    if (this.#listeners.size === 1) {
      const running = new AbortController();
      const end = this.#feed?.listen((news) => {
        if (news instanceof AgentStateError) this.#fail(news);
        else if (!news) this.#snapshot.error && this.refresh();
        else if (!news.data.kind || this.#isMine(news)) void this.#hear(news);
      });
      running.signal.addEventListener("abort", () => end?.());
      this.#running = running;
      void this.refresh();
    }
    return () => {
      this.#listeners.delete(listener);
      if (this.#listeners.size) return;
      this.#running?.abort();
      this.#running = undefined;
    };
  };

  /** Load it again; a failure is in `error`. */
  readonly refresh = (): Promise<void> => this.#hear(RESET);

  async #hear(event: LiveEvent): Promise<void> {
    if (!this.#load) return;
    if (this.#news) {
      this.#news.push(event);
      return;
    }
    let failures = 0;
    for (this.#news = [event]; this.#news.length; ) {
      const events = this.#news.splice(0);
      try {
        const data = await this.#load(this.#snapshot.data, events);
        this.#snapshot = { data, error: null, isLoading: false };
        failures = 0;
        this.#tell();
      } catch (cause) {
        const error = AgentStateError.from(cause);
        this.#fail(error);
        if (error.isPassing && this.#running) {
          await pause(delayAfter(failures++, error), this.#running.signal);
          if (this.#running) this.#news.push(RESET);
        }
      }
    }
    this.#news = undefined;
  }

  #fail(error: AgentStateError): void {
    this.#snapshot = { ...this.#snapshot, error, isLoading: false };
    this.#tell();
  }

  #tell(): void {
    for (const listener of this.#listeners) listener();
  }
}

/** All agents, by id. */
export function liveAgents(client: Calls, feed?: OperatorFeed): LiveValue<readonly Agent[]> {
  const all = async (): Promise<Agent[]> => {
    const found: Agent[] = [];
    for (let after: string | null | undefined; after !== null; ) {
      const query = { limit: 1000, ...(after ? { after } : {}) };
      const page = await unwrap(client.GET("/api/agents", { params: { query } }));
      found.push(...page.items);
      after = page.next;
    }
    return found;
  };
  const one = async (agent_id: string): Promise<Agent | undefined> => {
    try {
      return await unwrap(client.GET("/api/agents/{agent_id}", { params: { path: { agent_id } } }));
    } catch (error) {
      if ((error as AgentStateError).status === 404) return undefined;
      throw error;
    }
  };
  return new LiveValue(
    feed,
    async (before, events) => {
      const ids = new Set(events.map((event) => event.data.key?.[0]));
      if (!before || ids.has(undefined) || ids.size > MANY) return all();
      const changed = await Promise.all([...(ids as Set<string>)].map(one));
      return [
        ...before.filter((agent) => !ids.has(agent.agent_id)),
        ...changed.filter((agent) => agent !== undefined),
      ].sort((a, b) => (a.agent_id < b.agent_id ? -1 : 1));
    },
    (event) => event.data.kind === "agents",
  );
}

/** One task, by its id. */
export function liveTask(client: Calls, task_id: string, feed?: OperatorFeed): LiveValue<Task> {
  return new LiveValue<Task>(
    feed,
    () => unwrap(client.GET("/api/tasks/{task_id}", { params: { path: { task_id } } })),
    ({ data }) => data.kind === "tasks" && data.key?.[1] === task_id,
  );
}
