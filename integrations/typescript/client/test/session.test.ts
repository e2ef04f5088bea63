/** The session of a page, with a real server behind a network that fails. */

import { existsSync } from "node:fs";
import { appendFile } from "node:fs/promises";
import { join } from "node:path";
import {
  AgentStateError,
  type JsonObject,
  type SessionOptions,
  type SessionSnapshot,
  SessionStore,
} from "@agent-state/client";
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "vitest";
import { FaultyProxy, until } from "../../test/proxy.js";
import { OPERATOR, Server } from "../../test/server.js";

let server: Server;
let proxy: FaultyProxy;
const open: SessionStore[] = [];

beforeAll(async () => {
  server = await Server.start();
});

beforeEach(async () => {
  proxy = await FaultyProxy.before(server.url);
});

afterEach(async () => {
  for (const store of open.splice(0)) store.stop();
  await proxy.close();
});

afterAll(() => server.remove());

function visit(options: SessionOptions): SessionStore {
  const store = new SessionStore({ baseUrl: proxy.url, ...options });
  open.push(store);
  store.start();
  return store;
}

/** The store of a new session that has been loaded. */
async function visiting(options: SessionOptions = {}): Promise<[SessionStore, string]> {
  const { id, token } = await server.session();
  const store = visit({ token, ...options });
  await until(() => store.getSnapshot().sessionStatus === "active");
  if (options.live !== false) await following();
  return [store, id];
}

/** Wait until a stream is open, and the load that it causes is over. */
async function following(): Promise<void> {
  await until(() => proxy.count("GET", "/events") > 0 && proxy.count("GET", "/session?") > 1);
}

const contents = (store: SessionStore, agent = "poet") =>
  (store.getSnapshot().conversations[agent]?.messages ?? []).map((message) => message.content);

const numbers = (store: SessionStore, agent = "poet") =>
  (store.getSnapshot().conversations[agent]?.messages ?? []).map((message) => message.seq);

const refused = (promise: Promise<unknown>) =>
  promise.then(
    () => expect.unreachable(),
    (error: unknown) => {
      expect(error).toBeInstanceOf(AgentStateError);
      return error as AgentStateError;
    },
  );

// -- the status --------------------------------------------------------------------------------

test("a session is loaded by its token, with the latest messages", async () => {
  const { id, token } = await server.session("ann");
  for (const text of ["one", "two", "three"]) await server.say(id, "poet", text);
  const seen: string[] = [];
  const store = new SessionStore({ baseUrl: proxy.url, token, messages: 2, live: false });
  store.subscribe(() => seen.push(store.getSnapshot().sessionStatus));

  const before = store.getSnapshot();
  store.start();
  await until(() => store.getSnapshot().isInitialized);
  const after = store.getSnapshot();

  expect(before).toMatchObject({ sessionStatus: "validating", isLoading: true, session: null });
  expect(after).toMatchObject({ sessionStatus: "active", isLoading: false, error: null });
  expect(after.session?.session_id).toBe(id);
  expect(after.session?.user_id).toBe("ann");
  expect(after.lastActivity).toBe(after.session?.last_activity);
  expect(contents(store)).toEqual(["two", "three"]);
  expect(new Set(seen)).toEqual(new Set(["validating", "active"]));
  expect(store.isSessionValid()).toBe(true);
  expect(store.getSessionAge()).toBeGreaterThanOrEqual(0);
  expect(store.getSessionAge()).toBeLessThan(60);
});

test("without a token nothing is requested", async () => {
  const store = visit({ token: null });

  await store.refreshSession();

  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "no_session", isInitialized: true });
  expect(proxy.requests).toEqual([]);
  await refused(store.sendMessage("poet", "hello"));
  expect(proxy.requests).toEqual([]);
});

test.each([
  ["a token that nobody knows", "unknown-token-0123456789"],
  ["a token that has no session", OPERATOR],
])("%s leads to no session, which is not an error", async (_, token) => {
  const store = visit({ token });

  await until(() => store.getSnapshot().isInitialized);

  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "no_session", error: null });
});

test("a token is asked for once, however often the store is started", async () => {
  const { token } = await server.session();
  let asked = 0;
  const getToken = async () => {
    asked += 1;
    return token;
  };
  const store = visit({ getToken });
  expect(store.getSnapshot().sessionStatus).toBe("creating");

  store.stop();
  store.start();
  await until(() => store.isSessionValid());
  store.stop();
  store.start();
  await store.refreshSession();

  expect(asked).toBe(1);
  expect(store.isSessionValid()).toBe(true);
});

test("a token that cannot be had is an error, and is asked for again on request", async () => {
  const { token } = await server.session();
  const answers = [Promise.reject(new TypeError("no connection")), Promise.resolve(token)];
  const store = visit({ getToken: () => answers.shift() ?? null });
  await until(() => store.getSnapshot().isInitialized);
  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "error", error: { code: "network" } });

  await store.refreshSession();

  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "active", error: null });
});

test("nobody has a token: no session", async () => {
  const store = visit({ getToken: () => null });

  await until(() => store.getSnapshot().isInitialized);

  expect(store.getSnapshot().sessionStatus).toBe("no_session");
  expect(proxy.requests).toEqual([]);
});

test("another token is another session, and nothing of the former one is left", async () => {
  const [store, id] = await visiting();
  await store.sendMessage("poet", "mine");
  const other = await server.session();

  const status = await store.initializeSession(other.token);

  expect(status).toBe("active");
  expect(store.getSnapshot().session?.session_id).toBe(other.id);
  expect(contents(store)).toEqual([]);
  expect(await store.initializeSession("unknown-token-0123456789")).toBe("no_session");
  expect(store.getSnapshot().session).toBeNull();
  expect(await server.said(id, "poet")).toEqual(["mine"]);
});

test("a session that is cleared stays cleared, and is still on the server", async () => {
  const [store, id] = await visiting();
  store.clearSession();
  store.start();
  await store.refreshSession();
  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "no_session", session: null });
  const requests = proxy.requests.length;

  await until(() => proxy.openAnswers === 0);

  expect(proxy.requests).toHaveLength(requests);
  await server.call("GET", `/api/global/session/${id}`);
});

test("a session that has ended on the server is expired, and keeps its data", async () => {
  const impatient = await Server.start("--runtime", "tests.typescript.app:impatient");
  const near = await FaultyProxy.before(impatient.url);
  try {
    const { id, token } = await impatient.session();
    const store = visit({ baseUrl: near.url, token });
    await until(() => store.getSnapshot().sessionStatus === "active");
    await until(async () => {
      await store.refreshSession();
      return store.getSnapshot().sessionStatus === "expired";
    });

    expect(store.getSnapshot()).toMatchObject({ error: null, session: { session_id: id } });
    expect(store.isSessionValid()).toBe(false);
    const late = await refused(store.sendMessage("poet", "too late"));
    expect(late).toMatchObject({ status: 410, code: "ended" });
  } finally {
    await near.close();
    await impatient.remove();
  }
});

test("a session that is destroyed while it is shown is gone", async () => {
  const [store, id] = await visiting();

  await server.call("DELETE", `/api/global/session/${id}`);

  await until(() => store.getSnapshot().sessionStatus === "no_session");
  expect(store.getSnapshot()).toMatchObject({ error: null, session: null });
  await until(() => proxy.openAnswers === 0);
});

test("when the network fails the data stay, and the error goes when it is back", async () => {
  const [store, id] = await visiting();
  await store.sendMessage("poet", "before");
  proxy.fault = () => ({ status: 502 });
  proxy.cut();

  await until(() => store.getSnapshot().error !== null);
  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "active", isLoading: false });
  expect(store.getSnapshot().session?.session_id).toBe(id);
  expect(contents(store)).toEqual(["before"]);
  await server.say(id, "poet", "meanwhile");
  proxy.fault = () => undefined;

  await until(() => store.getSnapshot().error === null);
  await until(() => contents(store).length === 2);
  expect(contents(store)).toEqual(["before", "meanwhile"]);
});

test("a server that is not there yet is an error, until it is there", async () => {
  const { token } = await server.session();
  proxy.fault = () => ({ status: 503 });
  const store = visit({ token });
  await until(() => store.getSnapshot().isInitialized);
  expect(store.getSnapshot()).toMatchObject({ sessionStatus: "error", error: { status: 503 } });

  proxy.fault = () => undefined;

  await until(() => store.isSessionValid());
  await until(() => proxy.count("GET", "/events") === 1); // and it is followed
});

// -- sending -----------------------------------------------------------------------------------

test("a message is pending until the server has it, and is never shown twice", async () => {
  const [store, id] = await visiting();
  const seen: [number, number][] = [];
  store.subscribe(() => {
    const { pending } = store.getSnapshot();
    seen.push([pending.length, contents(store).length]);
  });

  const sent = store.sendMessage("poet", { text: "hello" }, { metadata: { page: 1 } });
  expect(store.getSnapshot().pending).toMatchObject([
    { agent: "poet", content: { text: "hello" }, failures: 0, error: null },
  ]);
  const message = await sent;

  expect(message).toMatchObject({ seq: 1, role: "user", metadata: { page: 1 } });
  expect(store.getSnapshot().pending).toEqual([]);
  expect(contents(store)).toEqual([{ text: "hello" }]);
  expect(seen.filter(([pending, shown]) => pending + shown !== 1)).toEqual([]);
  expect(await server.said(id, "poet")).toEqual([{ text: "hello" }]);
});

test("a message whose answer is lost is sent again with its key, and stored once", async () => {
  const [store, id] = await visiting();
  let lost = 0;
  proxy.fault = (method) => (method === "POST" && ++lost <= 2 ? "lose the answer" : undefined);

  const message = await store.sendMessage("poet", "once");

  expect(message.seq).toBe(1);
  expect(await server.said(id, "poet")).toEqual(["once"]);
  const posts = proxy.requests.filter((one) => one.method === "POST");
  expect(posts.length).toBeGreaterThanOrEqual(3);
  expect(new Set(posts.map((one) => one.headers["idempotency-key"])).size).toBe(1);
  expect(contents(store)).toEqual(["once"]);
});

test("two messages with the same words are two messages", async () => {
  const [store, id] = await visiting();

  await Promise.all([store.sendMessage("poet", "again"), store.sendMessage("poet", "again")]);

  expect(await server.said(id, "poet")).toEqual(["again", "again"]);
  expect(contents(store)).toEqual(["again", "again"]);
});

test("messages of one conversation keep their order, those of another do not wait", async () => {
  const [store, id] = await visiting();
  const texts = Array.from({ length: 8 }, (_, number) => `${number}`);
  let failures = 0;
  proxy.fault = (method, path) => {
    if (method !== "POST" || !path.includes("/poet/")) return undefined;
    return ++failures % 3 === 1
      ? { status: 502 }
      : failures % 3 === 2
        ? "lose the answer"
        : undefined;
  };

  const sent = texts.map((text) => store.sendMessage("poet", text));
  await store.sendMessage("critic", "I do not wait");
  expect(await server.said(id, "poet")).not.toEqual(texts);
  await Promise.all(sent);

  expect(await server.said(id, "poet")).toEqual(texts);
  expect(contents(store)).toEqual(texts);
  expect(store.getSnapshot().pending).toEqual([]);
});

test("a pending message tells how often it failed, and why", async () => {
  const [store] = await visiting();
  proxy.fault = (method) => (method === "POST" ? { status: 504 } : undefined);
  const sent = store.sendMessage("poet", "hello");

  await until(() => (store.getSnapshot().pending[0]?.failures ?? 0) >= 2);
  expect(store.getSnapshot().pending).toMatchObject([{ error: { status: 504 } }]);
  proxy.fault = () => undefined;

  await sent;
});

test("the server says when to come again", async () => {
  const [store] = await visiting();
  proxy.fault = (method) =>
    method === "POST" ? { status: 503, headers: { "Retry-After": "3600" } } : undefined;
  const end = new AbortController();
  const sent = refused(store.sendMessage("poet", "hello", { signal: end.signal }));
  await until(() => store.getSnapshot().pending[0]?.failures === 1);

  await store.refreshSession(); // some time goes by
  expect(proxy.count("POST", "/messages")).toBe(1);
  end.abort();

  expect((await sent).code).toBe("cancelled");
  expect(store.getSnapshot().pending).toEqual([]);
});

test.each([
  ["an unknown agent type", "A wizard!", "hello", 422, "invalid"],
  ["more than the server takes", "poet", "x".repeat(2_000_000), 413, "too_large"],
])("%s is refused, and not sent again", async (_, agent, content, status, code) => {
  let posts = 0;
  const counted = (request: Request) => {
    posts += Number(request.method === "POST");
    return fetch(request);
  };
  const { token } = await server.session();
  const store = visit({ baseUrl: server.url, token, fetch: counted, live: false });
  await until(() => store.isSessionValid());

  const error = await refused(store.sendMessage(agent, content));

  expect(error).toMatchObject({ status, code });
  expect(posts).toBe(1);
  expect(store.getSnapshot().pending).toEqual([]);
  await store.sendMessage("poet", "the next one is sent"); // its queue is not stuck
});

test("a key that stands for other content is refused", async () => {
  const [store] = await visiting();
  const first = await store.sendMessage("poet", "mine", { key: "k" });
  const again = await store.sendMessage("poet", "mine", { key: "k" });

  const error = await refused(store.sendMessage("poet", "not mine", { key: "k" }));

  expect(again.message_id).toBe(first.message_id);
  expect(error).toMatchObject({ status: 422, code: "key_reused" });
});

test("a message that was handed over is sent though the page leaves the session's view", async () => {
  const [store, id] = await visiting();
  proxy.fault = (method) => (method === "POST" ? { status: 502 } : undefined);
  const sent = store.sendMessage("poet", "on its way");
  await until(() => proxy.count("POST", "/messages") > 0);

  store.stop();
  proxy.fault = () => undefined;
  await sent;

  expect(await server.said(id, "poet")).toEqual(["on its way"]);
});

test("what is on its way is cancelled when the session is cleared", async () => {
  const [store] = await visiting();
  proxy.fault = (method) => (method === "POST" ? { status: 502 } : undefined);
  const sent = refused(store.sendMessage("poet", "never"));
  await until(() => proxy.count("POST", "/messages") > 0);

  store.clearSession();

  expect((await sent).code).toBe("cancelled");
  expect(store.getSnapshot().pending).toEqual([]);
});

// -- the messages ------------------------------------------------------------------------------

test("messages of others come by themselves, each once and in order", async () => {
  const [store, id] = await visiting();
  const texts = Array.from({ length: 30 }, (_, number) => `${number}`);

  for (const text of texts) await server.say(id, "poet", text);

  await until(() => contents(store).length >= texts.length);
  expect(contents(store)).toEqual(texts);
});

test("a gap is filled, however large it is", async () => {
  const [store, id] = await visiting({ messages: 3, live: false });
  await store.sendMessage("poet", "0");
  const texts = Array.from({ length: 1100 }, (_, number) => `${number}`);
  // A person may add lines to a conversation, and so may a program: it is quicker than HTTP.
  const lines = texts.slice(1).map((content) => JSON.stringify({ role: "assistant", content }));
  const log = join(server.folder, "state", "conversations", id, "poet.jsonl");
  await until(() => existsSync(log));
  await appendFile(log, `${lines.join("\n")}\n`);
  await until(async () => (await server.said(id, "poet")).length === 1000);

  await store.refreshSession();

  expect(numbers(store)).toEqual(texts.map((_, index) => index + 1));
  expect(contents(store)).toEqual(texts);
});

test("earlier messages are loaded on request, without a gap", async () => {
  const { id, token } = await server.session();
  for (let number = 1; number <= 12; number++) await server.say(id, "poet", `${number}`);
  const store = visit({ token, messages: 5, live: false });
  await until(() => store.isSessionValid());

  const more = await store.loadEarlier("poet", 4);
  const evenMore = await store.loadEarlier("poet", 4);

  expect([more, evenMore]).toEqual([true, false]);
  expect(numbers(store)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
});

test("without messages at first, earlier ones are loaded on request", async () => {
  const { id, token } = await server.session();
  for (let number = 1; number <= 3; number++) await server.say(id, "poet", `${number}`);
  const store = visit({ token, messages: 0 });
  await until(() => store.isSessionValid());
  expect(store.getSnapshot().conversations.poet).toMatchObject({ message_count: 3, messages: [] });

  await store.loadEarlier("poet");
  await server.say(id, "poet", "4");

  await until(() => contents(store).length === 4);
  expect(numbers(store)).toEqual([1, 2, 3, 4]);
});

test("a server that is killed and started again in mid-conversation loses and doubles nothing", async () => {
  const [store, id] = await visiting();
  const texts = Array.from({ length: 12 }, (_, number) => `${number}`);

  const sent = texts.map((text) => store.sendMessage("poet", text));
  await sent[3];
  await server.kill();
  await until(() => store.getSnapshot().pending.some((one) => one.failures > 0));
  await server.start();
  await Promise.all(sent);
  await server.say(id, "poet", "after");

  expect(await server.said(id, "poet")).toEqual([...texts, "after"]);
  await until(() => contents(store).length === 13);
  expect(contents(store)).toEqual([...texts, "after"]);
});

// -- the state ---------------------------------------------------------------------------------

test("a change of the state is shown at once, and merged at every depth", async () => {
  const [store] = await visiting({ live: false });
  await store.updateSessionState({ filter: { colour: "red", size: 1 }, list: [1, 2] });

  const changed = store.updateSessionState({ filter: { size: 2 }, list: [3] });

  const shown = { filter: { colour: "red", size: 2 }, list: [3] };
  expect(store.getSnapshot().state).toEqual(shown);
  await changed;
  expect(store.getSnapshot().state).toEqual(shown);
  expect(store.getSnapshot().session?.state).toEqual(shown);
  await store.updateSessionState({ only: "this" }, "replace");
  expect(store.getSnapshot().session?.state).toEqual({ only: "this" });
});

test.each<[string, JsonObject, JsonObject]>([
  ["null is a value", { a: { b: 1 } }, { a: null }],
  ["a list is replaced by an object", { a: [1] }, { a: { b: 1 } }],
  ["an object is replaced by a number", { a: { b: 1 } }, { a: 1 }],
  ["names of the language are names", { constructor: { a: 1 } }, { constructor: { b: 2 } }],
  ["an empty change", { a: 1 }, {}],
])("what is shown at once is what the server makes of it: %s", async (_, before, patch) => {
  const [store] = await visiting({ live: false });
  await store.updateSessionState(before);

  const changed = store.updateSessionState(patch);
  const shown = store.getSnapshot().state;
  await changed;

  expect(store.getSnapshot().session?.state).toEqual(shown);
});

test("a change that fails is taken back, and later ones stay", async () => {
  const [store] = await visiting({ live: false });
  await store.updateSessionState({ a: 1, b: 1 });
  let patches = 0;
  proxy.fault = (method) => (method === "PATCH" && ++patches === 1 ? { status: 500 } : undefined);

  const first = refused(store.updateSessionState({ a: 2 }));
  const second = store.updateSessionState({ b: 2 });
  expect(store.getSnapshot().state).toEqual({ a: 2, b: 2 });
  expect(await first).toMatchObject({ status: 500 });
  await second;

  expect(store.getSnapshot().state).toEqual({ a: 1, b: 2 });
  expect(store.getSnapshot().session?.state).toEqual({ a: 1, b: 2 });
});

test("a change whose answer is lost rejects, and is shown as far as it was carried out", async () => {
  const [store] = await visiting({ live: false });
  proxy.fault = (method) => (method === "PATCH" ? "lose the answer" : undefined);

  const error = await refused(store.updateSessionState({ a: 1 }));
  expect(error.code).toBe("network");

  await until(() => store.getSnapshot().state.a === 1);
});

test("an older answer never follows a newer one", async () => {
  const [store] = await visiting();
  const states: unknown[] = [];
  store.subscribe(() => states.push(store.getSnapshot().state.count));

  for (let count = 1; count <= 20; count++) {
    void store.refreshSession();
    await store.updateSessionState({ count });
  }

  expect(states.filter((count) => count !== undefined)).toEqual(
    states.filter((count) => count !== undefined).toSorted((a, b) => Number(a) - Number(b)),
  );
});

test("a change of another page comes by itself", async () => {
  const [store, id] = await visiting();

  await server.call("PATCH", `/api/global/session/${id}`, { state: { from: "elsewhere" } });

  await until(() => store.getSnapshot().state.from === "elsewhere");
});

test("activity renews the session", async () => {
  const [store] = await visiting({ live: false });
  const before = store.getSnapshot();

  await store.updateLastActivity();

  const after = store.getSnapshot();
  expect((after.lastActivity ?? "") > (before.lastActivity ?? "")).toBe(true);
  expect((after.session?.expires_at ?? "") > (before.session?.expires_at ?? "")).toBe(true);
});

test("several workflows of one orchestrator are all there", async () => {
  const [store, id] = await visiting();
  const path = `/api/global/session/${id}/orchestrators/Weather/workflows`;

  await server.call("PUT", `${path}/w1`, { status: "processing", progress: { done: 1 } });
  await server.call("PUT", `${path}/w2`, { status: "completed" });

  await until(() => store.getSnapshot().orchestratorContext?.finished_orchestrators.length === 1);
  const { orchestratorContext, orchestratorStates } = store.getSnapshot();
  expect(orchestratorStates).toEqual({ Weather: "completed" });
  expect(orchestratorContext?.active_orchestrators).toMatchObject([
    { workflow_id: "w1", status: "processing", progress: { done: 1 } },
  ]);
  expect(orchestratorContext?.finished_orchestrators).toMatchObject([{ workflow_id: "w2" }]);
});

// -- living ------------------------------------------------------------------------------------

test("stopping ends the stream, and starting goes on", async () => {
  const [store, id] = await visiting();
  await until(() => proxy.openAnswers === 1);

  store.stop();
  await until(() => proxy.openAnswers === 0);
  await server.say(id, "poet", "meanwhile");
  store.start();

  await until(() => contents(store).length === 1);
  await until(() => proxy.openAnswers === 1);
});

test("without live changes there is no stream", async () => {
  const [store, id] = await visiting({ live: false });
  await server.say(id, "poet", "unheard");

  await store.refreshSession();

  expect(contents(store)).toEqual(["unheard"]);
  expect(proxy.count("GET", "/events")).toBe(0);
});

test("a snapshot does not change, and is the same until something does", async () => {
  const [store] = await visiting({ live: false });
  const before = store.getSnapshot();
  const copy = structuredClone(before) as SessionSnapshot;

  await store.sendMessage("poet", "hello");

  expect(before).toEqual(copy);
  expect(store.getSnapshot()).not.toBe(before);
  expect(store.getSnapshot()).toBe(store.getSnapshot());
});
