/** The provider and the hooks, with a real server behind a network that fails. */

import {
  AgentStateError,
  GlobalSessionProvider,
  type GlobalSessionProviderProps,
  useAgents,
  useConversation,
  useGlobalSession,
  useOrchestrator,
  useSession,
  useTask,
} from "@agent-state/react";
import { Component, type ReactNode, version } from "react";
import { renderToString } from "react-dom/server";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { FaultyProxy, until } from "../../test/proxy.js";
import { OPERATOR, Server } from "../../test/server.js";
import { Page, reading } from "./page.js";

let server: Server;
let proxy: FaultyProxy;

beforeAll(async () => {
  server = await Server.start("--runtime", "tests.typescript.app:busy");
});

beforeEach(async () => {
  proxy = await FaultyProxy.before(server.url);
});

afterEach(() => proxy.close());

afterAll(() => server.remove());

function Provider(props: GlobalSessionProviderProps) {
  return <GlobalSessionProvider baseUrl={proxy.url} {...props} />;
}

/** A page with a session of its own that has been loaded, and what `hook` returns there. */
async function visiting<T>(hook: () => T, props: GlobalSessionProviderProps = {}) {
  const { id, token } = await server.session();
  const [session, ReadSession] = reading(useSession);
  const [seen, Reader] = reading(hook);
  const page = new Page().show(
    <Provider token={token} {...props}>
      <ReadSession />
      <Reader />
    </Provider>,
  );
  await until(() => session.value?.sessionStatus === "active");
  if (props.live !== false) await until(() => proxy.count("GET", "/session?") > 1);
  return { id, token, page, session, seen };
}

test("the tests run with both versions of React", ({ task }) => {
  const project = task.file.projectName ?? "";

  expect(project).toBe(`react ${version.split(".")[0]}`);
});

describe("GlobalSessionProvider", () => {
  test.each([false, true])(
    "asks for the token once, and follows once; strict: %s",
    async (strict) => {
      const { id, token } = await server.session();
      const getToken = vi.fn(async () => token);
      const [seen, Reader] = reading(useSession);
      const page = new Page(strict);
      page.show(
        <Provider getToken={getToken}>
          <Reader />
        </Provider>,
      );
      await until(() => seen.value?.sessionStatus === "active");
      expect(inTurn(seen.all.map((one) => one.sessionStatus))).toEqual([
        "creating",
        "validating",
        "active",
      ]);
      await until(() => proxy.openAnswers === 1);
      await server.say(id, "poet", "hello");
      await until(() => seen.value.conversations.poet?.messages.length === 1);

      expect(getToken).toHaveBeenCalledTimes(1);
      await until(() => proxy.openAnswers === 1); // the stream: what asked for the message has ended
      page.close();
      await until(() => proxy.openAnswers === 0);
    },
  );

  test("keeps the token in memory only", async () => {
    const { token, page } = await visiting(useSession);

    expect(window.localStorage).toHaveLength(0);
    expect(window.sessionStorage).toHaveLength(0);
    expect(document.cookie).toBe("");
    expect(document.documentElement.outerHTML).not.toContain(token);
    expect(proxy.requests.filter((one) => one.path.includes(token))).toEqual([]);
    page.close();
  });

  test.each([false, true])("makes no request without a token; strict: %s", async (strict) => {
    const [seen, Reader] = reading(useSession);
    new Page(strict).show(
      <Provider token={null}>
        <Reader />
      </Provider>,
    );

    await until(() => seen.value?.isInitialized);
    await seen.value.refreshSession();
    expect(seen.value).toMatchObject({ sessionStatus: "no_session", session: null, error: null });
    await expect(seen.value.sendMessage("poet", "hello")).rejects.toThrow(AgentStateError);
    expect(proxy.requests).toEqual([]);
  });

  test("begins when a token comes, and leaves the session when it goes", async () => {
    const { id, token } = await server.session();
    const [seen, Reader] = reading(useSession);
    const page = new Page(true);
    const show = (token: string | null) =>
      page.show(
        <Provider token={token}>
          <Reader />
        </Provider>,
      );
    show(null);
    await until(() => seen.value?.isInitialized);

    show(token);
    await until(() => seen.value.session?.session_id === id);
    await until(() => proxy.openAnswers === 1);
    show(null);

    await until(() => seen.value.sessionStatus === "no_session");
    await until(() => proxy.openAnswers === 0);
    expect(seen.value.session).toBeNull();
  });

  test("ends the stream when it is unmounted", async () => {
    const { page } = await visiting(useSession);
    await until(() => proxy.openAnswers === 1);

    page.close();

    await until(() => proxy.openAnswers === 0);
    const requests = proxy.requests.length;
    await server.session();
    expect(proxy.requests).toHaveLength(requests);
  });

  test("follows as long as live is true", async () => {
    const { id, token } = await server.session();
    const [seen, Reader] = reading(useSession);
    const page = new Page();
    const show = (live: boolean) =>
      page.show(
        <Provider token={token} live={live}>
          <Reader />
        </Provider>,
      );
    show(false);
    await until(() => seen.value?.sessionStatus === "active");
    expect(proxy.count("GET", "/events")).toBe(0);
    await server.say(id, "poet", "hello");

    show(true);
    await until(() => seen.value.conversations.poet?.messages.length === 1);
    await until(() => proxy.openAnswers === 1);
    show(false);
    await until(() => proxy.openAnswers === 0);
  });

  test("loads as many messages as it is told", async () => {
    const { id, token } = await server.session();
    for (const text of ["1", "2", "3"]) await server.say(id, "poet", text);
    const [seen, Reader] = reading(() => useConversation("poet").messages);

    new Page().show(
      <Provider token={token} messages={2} live={false}>
        <Reader />
      </Provider>,
    );

    await until(() => seen.value?.length === 2);
    expect(seen.value.map((message) => message.content)).toEqual(["2", "3"]);
  });

  test("makes its calls with the fetch that it is given", async () => {
    const paths: string[] = [];
    const counted = (request: Request) => {
      paths.push(new URL(request.url).pathname);
      return fetch(request);
    };

    await visiting(useSession, { fetch: counted, live: false });

    expect(new Set(paths)).toEqual(new Set(["/api/global/session"]));
  });

  test("requests nothing on a server", () => {
    const Status = () => <p>{useSession().sessionStatus}</p>;
    const getToken = vi.fn(() => "token");

    const html = renderToString(
      <Provider getToken={getToken}>
        <Status />
      </Provider>,
    );

    expect(html).toBe("<p>creating</p>");
    expect(getToken).not.toHaveBeenCalled();
    expect(proxy.requests).toEqual([]);
  });
});

/** The values in turn, without repetitions. */
const inTurn = <T,>(values: readonly T[]) =>
  values.filter((value, index) => index === 0 || value !== values[index - 1]);

describe("useSession", () => {
  class Boundary extends Component<{ children: ReactNode }> {
    override state = { message: "" };
    static getDerivedStateFromError = (error: Error) => ({ message: error.message });
    override render = () => this.state.message || this.props.children;
  }

  test.each<[string, () => unknown]>([
    ["useSession", useSession],
    ["useConversation", () => useConversation("poet")],
    ["useOrchestrator", () => useOrchestrator("Weather")],
    ["useAgents", useAgents],
    ["useTask", () => useTask("1")],
  ])("outside of the provider %s throws, and names the provider", async (name, hook) => {
    vi.mocked(console.error).mockImplementation(() => undefined); // React tells of the error, too
    const [, Reader] = reading(hook);
    const page = new Page().show(
      <Boundary>
        <Reader />
      </Boundary>,
    );

    await until(() => page.text !== "");
    expect(page.text).toBe(`${name} is used outside of <GlobalSessionProvider>`);
    vi.mocked(console.error).mockClear();
  });

  test("is useGlobalSession, too", () => {
    expect(useGlobalSession).toBe(useSession);
  });

  test("has all that a page needs", async () => {
    const { id, session } = await visiting(useSession, { live: false });

    expect(Object.keys(session.value).sort()).toEqual(
      [
        ..."sessionStatus session error isLoading isInitialized lastActivity state".split(" "),
        ..."orchestratorStates orchestratorContext conversations pending".split(" "),
        ..."isSessionValid getSessionAge initializeSession refreshSession clearSession".split(" "),
        ..."updateSessionState updateLastActivity sendMessage".split(" "),
      ].sort(),
    );
    expect(session.value.session?.session_id).toBe(id);
    expect(session.value.isSessionValid()).toBe(true);
    expect(session.value.getSessionAge()).toBeGreaterThanOrEqual(0);
  });

  test("its functions stay the same, so that effects may depend on them", async () => {
    const { session } = await visiting(useSession, { live: false });
    const before = session.value;

    await before.updateSessionState({ a: 1 });
    await until(() => session.value !== before);

    for (const [name, value] of Object.entries(before)) {
      if (typeof value === "function") expect(session.value).toHaveProperty(name, value);
    }
  });

  test("a message is on the page at once, and once", async () => {
    const { id, session, seen } = await visiting(() => useConversation("poet"));
    let lost = 0;
    proxy.fault = (method) => (method === "POST" && ++lost === 1 ? "lose the answer" : undefined);

    const sent = session.value.sendMessage("poet", "hello");
    await until(() => seen.value.pending.length === 1);
    const message = await sent;
    await until(() => seen.value.messages.length === 1);

    expect(seen.value.messages).toEqual([message]);
    expect(
      inTurn(seen.all.map(({ messages, pending }) => [messages.length, pending.length].join())),
    ).toEqual(["0,0", "0,1", "1,0"]);
    expect(await server.said(id, "poet")).toEqual(["hello"]);
  });

  test("a change of the state is shown at once, and taken back if it fails", async () => {
    const { session } = await visiting(useSession, { live: false });
    await session.value.updateSessionState({ colour: "red" });
    proxy.fault = (method) => (method === "PATCH" ? { status: 500 } : undefined);

    const error = await session.value
      .updateSessionState({ colour: "blue" })
      .catch((error: unknown) => error);
    await until(() => session.value.state.colour === "red");

    expect(inTurn(session.all.map((one) => one.state.colour))).toEqual([
      undefined,
      "red",
      "blue",
      "red",
    ]);
    expect(error).toBeInstanceOf(AgentStateError);
    expect(error).toHaveProperty("status", 500);
  });

  test("a session that is cleared, and another that is begun", async () => {
    const { session } = await visiting(useSession);
    const other = await server.session();

    session.value.clearSession();
    await until(() => session.value.sessionStatus === "no_session");
    expect(await session.value.initializeSession(other.token)).toBe("active");

    await until(() => session.value.session?.session_id === other.id);
  });

  test("when the network fails the data stay, and the error is there", async () => {
    const { id, session } = await visiting(useSession);
    proxy.fault = () => ({ status: 502 });

    await session.value.refreshSession();
    await until(() => session.value.error !== null);
    expect(session.value).toMatchObject({ sessionStatus: "active", session: { session_id: id } });
    expect(session.value.error?.status).toBe(502);

    proxy.fault = () => undefined;
    await until(() => session.value.error === null);
  });
});

describe("useConversation", () => {
  test("shows the messages of one agent, and sends to it", async () => {
    const { id, seen } = await visiting(() => useConversation("poet"));
    expect(seen.value).toMatchObject({ messages: [], pending: [], conversation: null });

    await seen.value.send("hello");
    await server.say(id, "poet", "good day");
    await server.say(id, "critic", "tut");

    await until(() => seen.value.messages.length === 2);
    expect(seen.value.messages.map((one) => [one.seq, one.role, one.content])).toEqual([
      [1, "user", "hello"],
      [2, "assistant", "good day"],
    ]);
    expect(seen.value.conversation?.message_count).toBe(2);
    expect(seen.value.hasEarlier).toBe(false);
  });

  test("loads earlier messages", async () => {
    const { id, token } = await server.session();
    for (let number = 1; number <= 5; number++) await server.say(id, "poet", `${number}`);
    const [seen, Reader] = reading(() => useConversation("poet"));
    new Page().show(
      <Provider token={token} messages={2}>
        <Reader />
      </Provider>,
    );
    await until(() => seen.value?.hasEarlier);

    expect(await seen.value.loadEarlier(2)).toBe(true);
    expect(await seen.value.loadEarlier(2)).toBe(false);

    await until(() => seen.value.messages.length === 5);
    expect(seen.value.messages.map((message) => message.seq)).toEqual([1, 2, 3, 4, 5]);
    expect(seen.value.hasEarlier).toBe(false);
  });

  test("is not rendered for what happens elsewhere", async () => {
    const { id, session, seen } = await visiting(() => useConversation("poet"));
    await seen.value.send("hello");
    await until(() => seen.value.messages.length === 1 && seen.value.pending.length === 0);
    await session.value.refreshSession();
    const before = seen.value;

    await server.say(id, "critic", "tut");
    await until(() => session.value.conversations.critic?.messages.length === 1);

    expect(seen.value).toBe(before);
  });

  test("another agent is another conversation", async () => {
    const { id, token } = await server.session();
    await server.say(id, "poet", "ode");
    await server.say(id, "critic", "tut");
    const page = new Page();
    const Talk = ({ agent }: { agent: string }) =>
      useConversation(agent).messages.map((message) => `${message.content}`);
    const show = (agent: string) =>
      page.show(
        <Provider token={token} live={false}>
          <Talk agent={agent} />
        </Provider>,
      );
    show("poet");
    await until(() => page.text === "ode");

    show("critic");

    await until(() => page.text === "tut");
  });
});

describe("useOrchestrator", () => {
  test("has several workflows of one name, and the status of the last", async () => {
    const { id, seen } = await visiting(() => useOrchestrator("Weather"));
    expect(seen.value).toEqual({ status: "not_started", workflows: [] });
    const path = `/api/global/session/${id}/orchestrators`;

    await server.call("PUT", `${path}/Weather/workflows/w1`, { status: "processing" });
    await server.call("PUT", `${path}/Other/workflows/w2`, { status: "processing" });
    await server.call("PUT", `${path}/Weather/workflows/w3`, { status: "completed" });

    await until(() => seen.value.workflows.length === 2);
    expect(seen.value.workflows.map((one) => [one.workflow_id, one.status])).toEqual([
      ["w1", "processing"],
      ["w3", "completed"],
    ]);
    expect(seen.value.status).toBe("completed");
  });
});

describe("useAgents and useTask", () => {
  /** A page of an operator, who has no session. */
  function operating<T>(hook: () => T, token: string | null = OPERATOR) {
    const [seen, Reader] = reading(hook);
    const page = new Page(true).show(
      <Provider token={token}>
        <Reader />
      </Provider>,
    );
    return { seen, page };
  }

  test("agents come, change and go by themselves", async () => {
    const { seen, page } = operating(useAgents);
    const named = (name: string) => seen.value?.agents.find((one) => one.agent_id === name);
    await until(() => seen.value && !seen.value.isLoading);

    await server.call("POST", "/api/agents", { agent_id: "ada", agent_type: "worker" });
    await until(() => named("ada")?.status === "idle");
    await server.call("POST", "/api/agents/ada/stop");
    await until(() => named("ada")?.status === "stopped");

    expect(seen.value.error).toBeNull();
    page.close();
    await until(() => proxy.openAnswers === 0);
  });

  test("when the network fails the agents stay, and the error is there until it is back", async () => {
    await server.call("POST", "/api/agents", { agent_id: "early", agent_type: "worker" });
    const { seen } = operating(useAgents);
    await until(() => proxy.open("/api/events") === 1 && seen.value.agents.length > 0);
    await until(() => proxy.count("GET", "/api/agents?") > 1); // `ready` asks once more
    await until(() => proxy.openAnswers === 1); // nothing but the stream is under way
    const before = seen.value.agents;

    proxy.fault = () => ({ status: 502 });
    proxy.cut();
    await until(() => seen.value.error !== null);
    expect(seen.value).toMatchObject({ agents: before, isLoading: false });

    await server.call("POST", "/api/agents", { agent_id: "late", agent_type: "worker" });
    proxy.fault = () => undefined;
    await until(() => seen.value.error === null);
    await until(() => seen.value.agents.some((one) => one.agent_id === "late"));
  });

  test("a visitor may not see the agents, and is told so", async () => {
    const { seen } = await visiting(useAgents);

    await until(() => seen.value.error !== null);
    expect(seen.value).toMatchObject({ agents: [], isLoading: false, error: { status: 403 } });
  });

  test("without a token nothing is requested", async () => {
    const { seen } = operating(useAgents, null);
    await until(() => seen.value !== undefined);

    await seen.value.refresh();

    expect(seen.value).toMatchObject({ agents: [], error: null });
    expect(proxy.requests).toEqual([]);
  });

  test("a task is followed until it has its result", async () => {
    await server.call("POST", "/api/agents", { agent_id: "bob", agent_type: "worker" });
    const task = await server.call<{ task_id: string }>("POST", "/api/agents/bob/tasks", {
      name: "count",
      payload: { text: "one two three" },
      delay_seconds: 1_000_000,
    });
    const { seen } = operating(() => useTask(task.task_id));
    await until(() => seen.value?.task?.status === "pending");

    await server.call("POST", `/api/agents/bob/tasks/${task.task_id}/cancel`);

    await until(() => seen.value.task?.status === "cancelled");
  });

  test("a task that nobody knows is an error", async () => {
    const { seen } = operating(() => useTask("nothing"));

    await until(() => !!seen.value?.error);
    expect(seen.value).toMatchObject({ task: null, isLoading: false, error: { status: 404 } });
  });
});
