// @ts-check
import { useEffect, useState } from "../vendor/libraries.mjs";
import { ApiError, api, get, post } from "../api.js";
import { to } from "../router.js";
import {
  ActionButton, DialogButton, Facts, Field, Filters, Heading, Json, Loaded, Pager, Status, Table, Unusable, When,
  attempt, documentPlace, hasRuntime, html, text, useData,
} from "../ui.js";

const STATUSES = ["unread", "read", "replied", "archived"];
const LONGEST_THREAD = 50;

/** @param {{parts: string[], query: URLSearchParams}} props */
export const Mail = ({ parts: [agent, id], query }) =>
  agent && id ? html`<${Message} agent=${agent} id=${id} />` : html`<${MailList} query=${query} />`;

/** @param {{mail: Api["Mail"][], without?: string}} props */
export function MailTable({ mail, without }) {
  const names = ["Subject", "From", "To", "Status", "Sent"].filter((name) => name.toLowerCase() !== without);
  return html`<${Table} label="Mail" columns=${names} empty="There is no such mail." rows=${mail.map((one) => ({
    key: `${one.to_agent}/${one.message_id}`,
    href: to(["mail", one.to_agent, one.message_id]),
    cells: [
      one.subject || "(no subject)",
      one.from_agent,
      ...(without === "to" ? [] : [one.to_agent]),
      html`<${Status} value=${one.status} />`,
      html`<${When} at=${one.timestamp} />`,
    ],
  }))} />`;
}

/** @param {{query: URLSearchParams}} props */
function MailList({ query }) {
  const [status, receiver, sender, search, after] = ["status", "to", "from", "text", "after"].map((name) => query.get(name));
  /** @type {import("../ui.js").Found<Api["MailPage"]>} */
  const found = useData(api(["mail"], { status, to_agent: receiver, from_agent: sender, text: search, after, limit: 50 }), ["mail"]);
  return html`<${Heading} title="Mail">${hasRuntime.value && html`<${SendMail} to="" />`}<//>
    <${Filters} fields=${[
      { name: "status", label: "Status", options: STATUSES },
      { name: "to", label: "To" },
      { name: "from", label: "From" },
      { name: "text", label: "Subject" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${MailTable} mail=${found.data.items} /><${Pager} next=${found.data.next} />`}<//>`;
}

/** @param {{to: string}} props */
export const SendMail = ({ to: receiver }) => html`<${DialogButton} label="Send mail" action="Send"
  onSubmit=${(/** @type {FormData} */ data, /** @type {string} */ key) =>
    attempt(() => post(api(["agents", text(data, "to"), "mail"]), {
      from_agent: text(data, "from"),
      subject: text(data, "subject"),
      body: text(data, "body"),
      expects_reply: Boolean(data.get("reply")),
    }, { "Idempotency-Key": key }), "The mail is delivered.")}>
  <${Field} label="To"><input name="to" defaultValue=${receiver} required /><//>
  <${Field} label="From"><input name="from" defaultValue="operator" required /><//>
  <${Field} label="Subject"><input name="subject" /><//>
  <${Field} label="Text"><textarea name="body" rows="5"></textarea><//>
  <label class="check"><input type="checkbox" name="reply" /> It expects a reply</label><//>`;

/**
 * The messages before and after one: a message answers one of its sender's mailbox.
 * @param {Api["Mail"]} message
 */
async function threadOf(message) {
  const thread = [message];
  const load = async (/** @type {string} */ agent, /** @type {string} */ id) => {
    try {
      return (await get(api(["agents", agent, "mail", id]))).body;
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return null; // it has been cleaned up
      throw error;
    }
  };
  for (let first = message; first?.reply_to && thread.length < LONGEST_THREAD; ) {
    first = await load(first.from_agent, first.reply_to);
    if (first) thread.unshift(first);
  }
  for (let last = message; last?.replied_with && thread.length < LONGEST_THREAD; ) {
    last = await load(last.from_agent, last.replied_with);
    if (last) thread.push(last);
  }
  return thread;
}

/** @param {{agent: string, id: string}} props */
function Message({ agent, id }) {
  /** @type {import("../ui.js").Found<Api["Mail"]>} */
  const found = useData(api(["agents", agent, "mail", id]), ["mail"]);
  const message = found.data;
  const [thread, setThread] = useState(/** @type {Api["Mail"][]} */ ([]));
  useEffect(() => {
    let over = false;
    if (message) void attempt(async () => {
      const all = await threadOf(message);
      if (!over) setThread(all);
    });
    return () => void (over = true);
  }, [message]);
  const mine = api(["agents", agent, "mail", id]);
  const reply = async (/** @type {string} */ body) => {
    const sent = (await post(`${mine}/reply`, { body })).body; // a second reply returns the first one
    if (sent.body !== body) throw new ApiError(409, "conflict", "It has been answered before, with another text.");
  };
  return html`<${Heading} title=${message?.subject || "Mail"} about=${html`Mail <code>${id}</code> in the mailbox of <a href=${to(["agents", agent])}>${agent}</a>`}>
      ${message && hasRuntime.value && html`
        ${message.status === "unread" && html`<${ActionButton} label="Mark as read" done="It is marked as read." work=${() => post(`${mine}/read`)} />`}
        ${!message.replied_with && html`<${DialogButton} label="Reply" action="Reply" onSubmit=${(/** @type {FormData} */ data) => attempt(() => reply(text(data, "body")), "The reply is delivered.")}>
          <p>${agent} answers ${message.from_agent}.</p>
          <${Field} label="Text"><textarea name="body" rows="5" required></textarea><//><//>`}
        ${message.status !== "archived" && html`<${ActionButton} label="Archive" done="It is archived." work=${() => post(`${mine}/archive`)} />`}`}<//>
    <${Loaded} found=${found}>${message && html`
      <${Facts} of=${[
        ["Status", html`<${Status} value=${message.status} />`],
        ["Priority", message.priority],
        ["Expects a reply", message.expects_reply && "yes"],
        ["File", html`<a href=${documentPlace("mail", [agent, id])}><code>mail/${agent}/${id}.json</code></a>`],
      ]} />
      <ol class="messages">${(thread.length ? thread : [message]).map((one) => html`<li key=${one.message_id} class=${one.message_id === id ? "here" : ""}>
        <p class="by"><a href=${to(["agents", one.from_agent])}>${one.from_agent}</a> to <a href=${to(["agents", one.to_agent])}>${one.to_agent}</a>, <${When} at=${one.timestamp} /></p>
        ${one.subject && html`<h2>${one.subject}</h2>`}
        ${typeof one.body === "string" ? html`<p class="text">${one.body}</p>` : html`<${Json} value=${one.body} label="Text" />`}</li>`)}</ol>`}<//>`;
}
