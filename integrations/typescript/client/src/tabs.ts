/** One event stream for all tabs of a site: a browser opens six connections to a host at most. */

import { AgentStateError, type ErrorCode } from "./error.js";
import { follow, type LiveEvent, type Stream } from "./events.js";

/** What the tabs tell each other. */
type Word =
  | { event: LiveEvent; to?: string }
  | { error: { code: ErrorCode; message: string } | null }
  | { hello: string };

/**
 * Follow a stream of that name together with the other tabs, until `signal`. One tab reads it and
 * tells the others; when it goes, the next one reads on where it was. Where the browser has no Web
 * Locks or no BroadcastChannel (outside HTTPS), each tab reads a stream of its own.
 *
 * The first event is `ready`: from then on no change is missed. It ends before `signal` when the
 * server refuses the stream for good.
 */
export async function followTogether(
  name: string,
  stream: Stream,
  signal: AbortSignal,
): Promise<void> {
  const locks = globalThis.navigator?.locks;
  const channel = locks && globalThis.BroadcastChannel && new BroadcastChannel(name);
  const here = Math.random().toString(36);
  let last: LiveEvent | undefined;
  let isReading = false;

  const hear = (word: Word) => {
    if ("event" in word) {
      if (word.to && (word.to !== here || last)) return;
      last = word.event;
      stream.onEvent(last);
    } else if ("error" in word) {
      stream.onError?.(word.error && new AgentStateError(word.error.code, word.error.message));
    } else if (isReading && last) {
      channel?.postMessage({ event: { ...last, event: "ready", data: {} }, to: word.hello });
    }
  };
  const tell = (word: Word) => {
    channel?.postMessage(word);
    hear(word);
  };
  const read = async () => {
    isReading = true;
    const { open } = stream;
    await follow(
      {
        open,
        onEvent: (event) => tell({ event }),
        onError: (error) => tell({ error: error && { code: error.code, message: error.message } }),
      },
      signal,
      last?.id,
    );
  };
  try {
    if (!channel) return await read();
    channel.onmessage = ({ data }) => hear(data);
    channel.postMessage({ hello: here });
    await locks.request(name, { signal }, read);
  } catch {
    // The signal came while another tab was reading, or the server refuses the stream.
  } finally {
    channel?.close();
  }
}
