// @ts-check
import { api, post } from "../api.js";
import { to } from "../router.js";
import {
  ActionButton, DialogButton, Facts, Field, Filters, Heading, Json, Loaded, Pager, Status, Table, Unusable, When,
  attempt, documentPlace, hasRuntime, html, text, typedJson, useData,
} from "../ui.js";
import { TaskTable } from "./tasks.js";
import { MailTable, SendMail } from "./mail.js";

const STATUSES = ["idle", "active", "sleeping", "waiting", "stopped"];

/** @param {{parts: string[], query: URLSearchParams}} props */
export const Agents = ({ parts: [id], query }) => (id ? html`<${Agent} id=${id} />` : html`<${AgentList} query=${query} />`);

/** @param {{query: URLSearchParams}} props */
function AgentList({ query }) {
  const [status, type, search, after] = ["status", "type", "text", "after"].map((name) => query.get(name));
  /** @type {import("../ui.js").Found<Api["AgentPage"]>} */
  const found = useData(api(["agents"], { status, agent_type: type, text: search, after, limit: 50 }), ["agents"]);
  return html`<${Heading} title="Agents" />
    <${Filters} fields=${[
      { name: "status", label: "Status", options: STATUSES },
      { name: "type", label: "Type" },
      { name: "text", label: "Id or name" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${Table} label="Agents" columns=${["Agent", "Type", "Status", "Last active"]} empty="No agent is like that."
        rows=${found.data.items.map((agent) => ({
          key: agent.agent_id,
          href: to(["agents", agent.agent_id]),
          cells: [
            agent.agent_name && agent.agent_name !== agent.agent_id ? `${agent.agent_id} (${agent.agent_name})` : agent.agent_id,
            agent.agent_type || "–",
            html`<${Status} value=${agent.status} />`,
            html`<${When} at=${agent.last_active} />`,
          ],
        }))} /><${Pager} next=${found.data.next} />`}<//>`;
}

/** @param {{id: string}} props */
function Agent({ id }) {
  /** @type {import("../ui.js").Found<Api["Agent"]>} */
  const found = useData(api(["agents", id]), ["agents"], [id]);
  /** @type {import("../ui.js").Found<Api["TaskPage"]>} */
  const tasks = useData(api(["tasks"], { agent_id: id, limit: 10 }), ["tasks"], [id]);
  /** @type {import("../ui.js").Found<Api["MailPage"]>} */
  const mail = useData(api(["mail"], { to_agent: id, limit: 10 }), ["mail"], [id]);
  const agent = found.data;
  return html`<${Heading} title=${id} about=${agent?.agent_type && `Agent of the type ${agent.agent_type}`}>
      ${agent && hasRuntime.value && html`<${AgentActions} id=${id} status=${agent.status} />`}<//>
    <${Loaded} found=${found}>${agent && html`
      ${agent.status === "sleeping" && html`<${Sleep} id=${id} />`}
      <${Facts} of=${[
        ["Status", html`<${Status} value=${agent.status} />`],
        ["Name", agent.agent_name],
        ["Created", html`<${When} at=${agent.created_at} />`],
        ["Last active", html`<${When} at=${agent.last_active} />`],
        ["Document", html`<a href=${documentPlace("agents", [id])}>agents / ${id}</a>`],
      ]} />
      <section><h2>Tasks <a href=${to(["tasks"], { agent: id })}>all</a></h2>
        <${Loaded} found=${tasks}>${tasks.data && html`<${TaskTable} tasks=${tasks.data.items} without="agent" />`}<//></section>
      <section><h2>Mail <a href=${to(["mail"], { to: id })}>all</a></h2>
        <${Loaded} found=${mail}>${mail.data && html`<${MailTable} mail=${mail.data.items} without="to" />`}<//></section>
      <section><h2>Memory</h2><${Json} value=${agent.context} label="Memory" /></section>
      <section><h2>Configuration</h2><${Json} value=${agent.configuration} label="Configuration" /></section>
      <section><h2>Further data</h2><${Json} value=${agent.metadata} label="Further data" /></section>`}<//>`;
}

/** @param {{id: string}} props */
function Sleep({ id }) {
  /** @type {import("../ui.js").Found<Api["Sleep"]>} */
  const found = useData(api(["agents", id, "sleep"]), ["sleep"], [id]);
  const sleep = found.error ? null : found.data;
  if (!sleep || !sleep.is_sleeping) return null;
  return html`<p class="remark">It sleeps ${sleep.sleep_until ? html`and wakes <${When} at=${sleep.sleep_until} />` : "until it is woken"}${
    sleep.reason && `: ${sleep.reason}`
  }. ${hasRuntime.value && html`<${ActionButton} label="Wake" done=${`${id} is awake.`} work=${() => post(api(["agents", id, "wake"]))} />`}</p>`;
}

/** @param {{id: string, status: string}} props */
function AgentActions({ id, status }) {
  return html`
    <${DialogButton} label="Queue a task" action="Queue" onSubmit=${(/** @type {FormData} */ data, /** @type {string} */ key) =>
      attempt(
        async () => post(api(["agents", id, "tasks"]), { name: text(data, "name"), payload: typedJson(text(data, "payload"), {}) }, { "Idempotency-Key": key }),
        "The task is queued.",
      )}>
      <${Field} label="Name"><input name="name" required /><//>
      <${Field} label="Payload (JSON)"><textarea name="payload" rows="5" placeholder="{}"></textarea><//><//>
    <${SendMail} to=${id} />
    <${DialogButton} label="Let it sleep" action="Sleep" onSubmit=${(/** @type {FormData} */ data) =>
      attempt(() => post(api(["agents", id, "sleep"]), {
        seconds: Number(text(data, "minutes")) * 60,
        reason: text(data, "reason") || null,
        wake_on: data.get("mail") ? ["mail_received"] : [],
      }), `${id} sleeps.`)}>
      <${Field} label="Minutes"><input name="minutes" type="number" min="0" step="any" defaultValue="10" required /><//>
      <${Field} label="Reason"><input name="reason" /><//>
      <label class="check"><input type="checkbox" name="mail" defaultChecked /> New mail wakes it</label><//>
    ${status === "stopped"
      ? html`<${ActionButton} label="Start" done=${`${id} runs.`} work=${() => post(api(["agents", id, "start"]))} />`
      : html`<${DialogButton} label="Stop" title=${`Stop ${id}?`} action="Stop" danger
          onSubmit=${() => attempt(() => post(api(["agents", id, "stop"])), `${id} has stopped.`)}>
          <p>It begins no further task until it is started again.</p><//>`}`;
}
