/** The event stream: its format, and what happens when it breaks. */

import {
  AgentStateError,
  createClient,
  follow,
  type LiveEvent,
  type Stream,
  unwrap,
} from "@agent-state/client";
import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import { FaultyProxy, until } from "../../test/proxy.js";
import { OPERATOR, Server } from "../../test/server.js";

let server: Server;
let proxy: FaultyProxy;
let number = 0;

beforeAll(async () => {
  server = await Server.start();
  proxy = await FaultyProxy.before(server.url);
});

beforeEach(() => {
  proxy.fault = () => undefined;
  proxy.requests.length = 0;
});

afterAll(async () => {
  await proxy.close();
  await server.remove();
});

/** The server's own stream of agents, through the proxy. */
function agents(events: LiveEvent[], token = OPERATOR): Stream {
  const client = createClient({ baseUrl: proxy.url, token });
  return {
    open: (last, signal) =>
      unwrap(
        client.GET("/api/events", {
          params: { query: { kind: ["agents"] }, header: last ? { "last-event-id": last } : {} },
          parseAs: "stream",
          signal,
        }),
      ) as Promise<ReadableStream<Uint8Array>>,
    onEvent: (event) => events.push(event),
  };
}

async function create(): Promise<string> {
  const agent_id = `agent-${++number}`;
  await server.call("POST", "/api/agents", { agent_id, agent_type: "poet" });
  return agent_id;
}

const names = (events: LiveEvent[]) => events.map((one) => one.data.key?.[0] ?? one.event);

test("a stream that is cut goes on where it was", async () => {
  const events: LiveEvent[] = [];
  const end = new AbortController();
  const followed = follow(agents(events), end.signal);
  await until(() => events.length > 0);
  const first = await create();
  await until(() => names(events).includes(first));

  proxy.fault = () => ({ status: 502 });
  proxy.cut();
  const missed = await create();
  await until(() => proxy.requests.length > 2);
  proxy.fault = () => undefined;
  await until(() => names(events).includes(missed));
  end.abort();
  await followed;

  expect([...new Set(names(events))]).toEqual(["ready", first, missed]);
  expect(proxy.requests.at(-1)?.headers["last-event-id"]).toBe(
    events.find((one) => one.data.key?.[0] === first)?.id ?? "",
  );
});

test("a server that was restarted knows no places, and says so", async () => {
  const events: LiveEvent[] = [];
  const end = new AbortController();
  const followed = follow(agents(events), end.signal);
  await until(() => events.length > 0);

  await server.kill();
  await server.start();
  await until(() => events.length > 1);
  end.abort();
  await followed;

  expect(names(events)).toEqual(["ready", "reset"]);
});

test("a stream that is refused for good ends", async () => {
  const followed = follow(agents([], "unknown-token-0123456789"), new AbortController().signal);

  await expect(followed).rejects.toThrow(AgentStateError);
  expect(proxy.requests).toHaveLength(1);
});

test("an end during a pause ends at once", async () => {
  proxy.fault = () => ({ status: 503, headers: { "Retry-After": "3600" } });
  const end = new AbortController();
  const errors: unknown[] = [];
  const followed = follow({ ...agents([]), onError: (error) => errors.push(error) }, end.signal);
  await until(() => errors.length > 0);

  end.abort();

  await followed;
});

// Bytes as a network may deliver them; the server itself always sends whole events with LF.
test.each([1, 2, 3, 5, 8, 1000])("events are read from pieces of %i bytes", async (size) => {
  const text =
    ': a comment\r\nevent: change\r\nid: s-1\r\ndata: {"kind":\r\ndata: "ägents"}\r\n\r\n' +
    ": alive\nid: s-2\n\n" +
    "event:gone\rid: s-3\rdata:{}\r\r" +
    "event: change\nid: s-4\ndata: {}\n\n";
  const bytes = new TextEncoder().encode(text);
  const events: LiveEvent[] = [];
  const end = new AbortController();

  await follow(
    {
      open: async () =>
        new ReadableStream({
          start(controller) {
            for (let at = 0; at < bytes.length; at += size) {
              controller.enqueue(bytes.slice(at, at + size));
            }
            controller.close();
          },
        }),
      onEvent: (event) => {
        events.push(event);
        if (events.length === 3) end.abort();
      },
    },
    end.signal,
  );

  expect(events).toEqual([
    { event: "change", id: "s-1", data: { kind: "ägents" } },
    { event: "gone", id: "s-3", data: {} },
    { event: "change", id: "s-4", data: {} },
  ]);
});
