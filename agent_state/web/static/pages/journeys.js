// @ts-check
/** The journeys of one user; the routes are those of an installed package. */
import { api } from "../api.js";
import { to } from "../router.js";
import { Facts, Filters, Heading, Json, Loaded, Pager, Table, Unusable, When, html, number, useData } from "../ui.js";

/** @param {{parts: string[], query: URLSearchParams}} props */
export const Journeys = ({ parts: [user, session], query }) =>
  user && session ? html`<${Journey} user=${user} session=${session} query=${query} />` : html`<${JourneyList} query=${query} />`;

/** @param {{query: URLSearchParams}} props */
function JourneyList({ query }) {
  const user = query.get("user");
  /** @type {import("../ui.js").Found<Api["JourneyPage"]>} */
  const found = useData(user ? api(["journeys", user], { after: query.get("after") }) : null, ["journeys"]);
  return html`<${Heading} title="Journeys" about="Conversations with emotions, milestones and breakthroughs." />
    <${Filters} fields=${[{ name: "user", label: "User" }]} />
    ${!user && html`<p class="empty">Whose? Type the id of a user.</p>`}
    ${user && html`<${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${Table} label="Journeys" columns=${["Journey", "Status", "Messages", "Last change"]} empty=${`${user} has no journey.`}
        rows=${found.data.items.map((one) => ({
          key: one.session_id,
          href: to(["journeys", user, one.session_id]),
          cells: [one.session_id, one.status, number(one.message_count ?? 0), html`<${When} at=${one.last_updated} />`],
        }))} /><${Pager} next=${found.data.next} />`}<//>`}`;
}

/** @param {{user: string, session: string, query: URLSearchParams}} props */
function Journey({ user, session, query }) {
  /** @type {import("../ui.js").Found<Api["Journey"]>} */
  const found = useData(api(["journeys", user, session]), ["journeys"], [user]);
  /** @type {import("../ui.js").Found<Api["JourneyMessagePage"]>} */
  const messages = useData(api(["journeys", user, session, "messages"], { before: query.get("after"), limit: 100 }), ["journeys"], [user]);
  const journey = found.data;
  return html`<${Heading} title=${`Journey of ${user}`} about=${html`Session <code>${session}</code>`} />
    <${Loaded} found=${found}>${journey && html`<${Facts} of=${[
      ["Status", journey.status],
      ["Begun", html`<${When} at=${journey.started_at} />`],
      ["Last change", html`<${When} at=${journey.last_updated} />`],
      ["Expires", html`<${When} at=${journey.expires_at} />`],
    ]} />
    <${Loaded} found=${messages}>${messages.data && html`<ol class="messages talk">${messages.data.items.map((one) => html`
      <li key=${one.message_id} class=${one.role}><p class="by">${one.role}${one.emotion_context && `, ${one.emotion_context}`}${one.is_milestone && ", milestone"} <${When} at=${one.timestamp} /></p>
      <p class="text">${one.content}</p></li>`)}</ol><${Pager} next=${messages.data.next} />`}<//>
    <section><h2>All of it</h2><${Json} value=${journey} label="Journey" /></section>`}<//>`;
}
