/** The server's live changes: server-sent events over `fetch`, which can send a token. */

import { AgentStateError } from "./error.js";
import { delayAfter, pause } from "./pause.js";

/** An event of the server: `ready`, `change`, `gone` or `reset`. */
export interface LiveEvent {
  readonly event: string;
  readonly id?: string | undefined;
  /** What changed; empty for `ready` and `reset`. */
  readonly data: { kind?: string; key?: string[]; revision?: number; outside?: boolean };
}

/** How a stream is opened, and what is told of it. */
export interface Stream {
  /** Opens the stream; throws `AgentStateError`. */
  open(lastEventId: string | undefined, signal: AbortSignal): Promise<ReadableStream<Uint8Array>>;
  onEvent(event: LiveEvent): void;
  /** The stream failed and is opened again later; null: it is open again. */
  onError?(error: AgentStateError | null): void;
}

/** The server sends something every 15 seconds; a stream that is silent for longer is dead. */
const SILENCE = 40_000;

/**
 * Follow a stream until `signal`: opens it again where it broke off, ever more rarely while that
 * fails. Throws `AgentStateError` once the server refuses it for good.
 */
export async function follow(
  stream: Stream,
  signal: AbortSignal,
  lastEventId?: string,
): Promise<void> {
  let failures = 0;
  while (!signal.aborted) {
    const connection = new AbortController();
    const end = () => connection.abort();
    let timer = setTimeout(end, SILENCE);
    let error: AgentStateError | undefined;
    try {
      const body = await stream.open(lastEventId, AbortSignal.any([signal, connection.signal]));
      stream.onError?.(null);
      for await (const event of parse(body, () => {
        clearTimeout(timer);
        timer = setTimeout(end, SILENCE);
      })) {
        failures = 0;
        lastEventId = event.id ?? lastEventId;
        if (event.event) stream.onEvent({ ...event, id: lastEventId });
      }
    } catch (cause) {
      error = AgentStateError.from(cause);
    } finally {
      clearTimeout(timer);
      end();
    }
    if (signal.aborted) return;
    if (error) {
      if (error.status >= 400 && error.status < 500) throw error;
      stream.onError?.(error);
    }
    await pause(delayAfter(failures++, error), signal);
  }
}

/** The events of a stream, as the HTML standard defines them; one without a name only moves the id. */
async function* parse(
  body: ReadableStream<Uint8Array>,
  onBytes: () => void,
): AsyncGenerator<LiveEvent> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let fields: Record<string, string> = {};
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onBytes();
    rest += decoder.decode(value, { stream: true });
    // A CR at the end may be half of a CRLF.
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop() as string;
    for (const line of lines) {
      const [, name, text] = /^([^:]*):? ?(.*)$/s.exec(line) as RegExpExecArray;
      if (line) {
        fields[name as string] =
          name === "data" && fields.data ? `${fields.data}\n${text}` : (text as string);
      } else {
        const { event = "", id, data } = fields;
        fields = {};
        yield { event, id, data: data ? JSON.parse(data) : {} };
      }
    }
  }
}
