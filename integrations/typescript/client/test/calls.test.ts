/** Typed calls and their errors. */

import { AgentStateError, createClient, unwrap } from "@agent-state/client";
import { afterAll, beforeAll, expect, test } from "vitest";
import { FaultyProxy } from "../../test/proxy.js";
import { OPERATOR, Server } from "../../test/server.js";
import { createCalls } from "../src/client.js";

let server: Server;
let proxy: FaultyProxy;

beforeAll(async () => {
  server = await Server.start();
  proxy = await FaultyProxy.before(server.url);
});

afterAll(async () => {
  await proxy.close();
  await server.remove();
});

const failure = async (call: Promise<unknown>): Promise<AgentStateError> => {
  const error = await call.then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(error).toBeInstanceOf(AgentStateError);
  return error as AgentStateError;
};

test("an id may contain any character", async () => {
  const client = createClient({ baseUrl: server.url, token: OPERATOR });
  const agent_id = "a/b %2F?#ü 🜁";

  await unwrap(client.POST("/api/agents", { body: { agent_id, agent_type: "poet" } }));
  const path = { agent_id };
  const agent = await unwrap(client.GET("/api/agents/{agent_id}", { params: { path } }));

  expect(agent.agent_id).toBe(agent_id);
});

test("an error is what the problem details say", async () => {
  const client = createClient({ baseUrl: server.url, token: OPERATOR });

  const unknown = await failure(
    unwrap(client.GET("/api/agents/{agent_id}", { params: { path: { agent_id: "nobody" } } })),
  );
  const invalid = await failure(
    unwrap(client.POST("/api/agents", { body: { agent_id: "", colour: 1 } as never })),
  );

  expect(unknown).toMatchObject({ status: 404, code: "not_found", errors: undefined });
  expect(invalid).toMatchObject({ status: 422, code: "invalid" });
  expect(invalid.errors?.map((one) => one.at)).toContain("body.colour");
});

test("a token may be asked for before each call", async () => {
  const tokens = ["wrong-token-0123456789", OPERATOR];
  const client = createClient({ baseUrl: server.url, token: () => tokens.shift() });

  const refused = await failure(unwrap(client.GET("/api/agents")));

  expect(refused).toMatchObject({ status: 401, code: "unauthorized" });
  await unwrap(client.GET("/api/agents"));
});

test("an answer that is not agent_state's is unexpected, and says when to come again", async () => {
  const client = createClient({ baseUrl: proxy.url, token: OPERATOR });
  proxy.fault = () => ({ status: 503, headers: { "Retry-After": "7" } });
  const unavailable = await failure(unwrap(client.GET("/api/agents")));
  proxy.fault = () => ({ status: 200 });
  const page = await failure(unwrap(client.GET("/api/agents")));

  expect(unavailable).toMatchObject({ status: 503, code: "unexpected", retryAfter: 7 });
  expect(unavailable.isPassing).toBe(true);
  expect(page).toMatchObject({ status: 0, code: "unexpected" });
});

test("where nothing comes the network has failed", async () => {
  const client = createClient({ baseUrl: proxy.url, token: OPERATOR });
  proxy.fault = () => "lose the answer";

  const lost = await failure(unwrap(client.GET("/api/agents")));

  expect(lost).toMatchObject({ status: 0, code: "network", isPassing: true });
  expect(lost.cause).toBeInstanceOf(TypeError);
});

test("the stores' own calls send what openapi-fetch sends, and return the same", async () => {
  const sent: string[] = [];
  const options = {
    baseUrl: `${server.url}/`,
    token: OPERATOR,
    fetch: async (request: Request) => {
      const body = await request.clone().text();
      const path = decodeURIComponent(request.url.replaceAll("+", " "));
      sent.push([request.method, path, ...[...request.headers].flat(), body].join(" "));
      return fetch(request);
    },
  };
  const ways = [createClient(options), createCalls(options)];
  const agent_id = "b/c %2F?#ü";
  const answers: unknown[][] = [];
  for (const { GET, POST } of ways) {
    const created = await POST("/api/agents", { body: { agent_id, agent_type: "poet" } });
    const agent = await GET("/api/agents/{agent_id}", { params: { path: { agent_id } } });
    const query = { status: ["idle" as const, "active" as const], limit: 3, text: "b/c %" };
    const found = await GET("/api/agents", { params: { query } });
    const header = { "last-event-id": "0-0" };
    const events = await GET("/api/events", { params: { header }, parseAs: "stream" });
    await (events.data as ReadableStream | undefined)?.cancel();
    const unknown = await GET("/api/agents/{agent_id}", { params: { path: { agent_id: "no" } } });
    answers.push([created.data, agent.data, found.data, events.response.status, unknown.error]);
  }

  expect(sent).toHaveLength(10);
  expect(sent.slice(5)).toEqual(sent.slice(0, 5));
  expect(answers[1]).toEqual(answers[0]);
});
