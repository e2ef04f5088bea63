// @ts-check
import { api, request } from "../api.js";
import { go, to } from "../router.js";
import {
  DialogButton, Facts, Filters, Heading, Json, Loaded, Pager, Table, Unusable, When,
  attempt, documentPlace, html, number, useData, writable,
} from "../ui.js";
import { Conversation } from "./conversation.js";

/** @param {{parts: string[], query: URLSearchParams}} props */
export function Sessions({ parts: [id, agent], query }) {
  if (id && agent) return html`<${Conversation} session=${id} agent=${agent} />`;
  return id ? html`<${Session} id=${id} />` : html`<${SessionList} query=${query} />`;
}

/** @param {{query: URLSearchParams}} props */
function SessionList({ query }) {
  const [user_id, after] = [query.get("user"), query.get("after")];
  const oldest_first = query.get("order") === "oldest" || null;
  /** @type {import("../ui.js").Found<Api["SessionPage"]>} */
  const found = useData(api(["global", "sessions"], { user_id, oldest_first, after }), ["sessions"]);
  return html`<${Heading} title="Sessions" about="Of people, with their conversations." />
    <${Filters} fields=${[
      { name: "user", label: "User" },
      { name: "order", label: "Order", options: ["oldest"], any: "latest first" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${Table} label="Sessions" columns=${["Session", "User", "Conversations", "Last activity", "Expires"]} empty="There is no session."
        rows=${found.data.items.map((session) => ({
          key: session.session_id,
          href: to(["sessions", session.session_id]),
          cells: [
            session.session_id,
            session.user_id ?? "anonymous",
            Object.keys(session.conversations).join(", ") || "–",
            html`<${When} at=${session.last_activity} />`,
            html`<${When} at=${session.expires_at} />`,
          ],
        }))} /><${Pager} next=${found.data.next} />`}<//>`;
}

/** @param {{id: string}} props */
function Session({ id }) {
  const path = api(["global", "session", id], { messages: 0 });
  /** @type {import("../ui.js").Found<Api["Session"]>} */
  const found = useData(path, ["sessions"], [id]);
  const session = found.data;
  const erase = () =>
    attempt(async () => {
      await request("DELETE", api(["global", "session", id]));
      go(to(["sessions"]));
    }, "The session is erased.");
  return html`<${Heading} title=${session?.user_id ?? "Anonymous session"} about=${html`Session <code>${id}</code>`}>
      ${session && writable.value && html`<${DialogButton} label="Erase" title="Erase 1 session?" action="Erase" danger onSubmit=${erase}>
        <p>Its conversations, states and history are erased, too. Nothing of them remains.</p><//>`}<//>
    <${Loaded} found=${found}>${session && html`
      <${Facts} of=${[
        ["User", session.user_id ?? "anonymous"],
        ["Created", html`<${When} at=${session.created_at} />`],
        ["Last activity", html`<${When} at=${session.last_activity} />`],
        ["Expires", html`<${When} at=${session.expires_at} />`],
        ["File", html`<a href=${documentPlace("sessions", [id])}><code>sessions/${id}.json</code></a>`],
      ]} />
      <section><h2>Conversations</h2><${Table} label="Conversations" columns=${["With", "Messages", "Last message"]} empty="Nothing has been said."
        rows=${Object.entries(session.conversations).map(([agentType, one]) => ({
          key: agentType,
          href: to(["sessions", id, agentType]),
          cells: [agentType, number(one.message_count), html`<${When} at=${one.last_message_at} />`],
        }))} /></section>
      <section><h2>State</h2><${Json} value=${session.state} label="State" /></section>
      <section><h2>Context</h2><${Json} value=${session.context} label="Context" /></section>
      ${Object.keys(session.workflow_states).length > 0 && html`<section><h2>Workflows</h2><${Json} value=${session.workflow_states} label="Workflows" /></section>`}`}<//>`;
}
