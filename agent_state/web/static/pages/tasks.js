// @ts-check
import { ApiError, api, post } from "../api.js";
import { go, to } from "../router.js";
import {
  DialogButton, Facts, Filters, Heading, Json, Loaded, Many, Pager, Status, Table, Unusable, When,
  attempt, documentPlace, hasRuntime, html, useData,
} from "../ui.js";

const STATUSES = ["pending", "in_progress", "completed", "failed", "dead", "cancelled"];
const ACTIONS = /** @type {const} */ ([
  ["retry", "Run again", ["dead", "failed", "cancelled"]],
  ["cancel", "Cancel", ["pending", "failed", "in_progress"]],
  ["delete", "Delete", ["completed", "dead", "cancelled"]],
]);
const DONE = { retry: "runs again", cancel: "is cancelled", delete: "is deleted" };

/** @param {{parts: string[], query: URLSearchParams}} props */
export const Tasks = ({ parts: [agent, id], query }) =>
  agent && id ? html`<${Task} agent=${agent} id=${id} />` : html`<${TaskList} query=${query} />`;

/** @param {{tasks: Api["Task"][], without?: string, empty?: string}} props */
export function TaskTable({ tasks, without, empty = "No task is like that." }) {
  const names = ["Task", "Agent", "Status", "Attempts", "Submitted", "Error"].filter((name) => name.toLowerCase() !== without);
  return html`<${Table} label="Tasks" columns=${names} empty=${empty} rows=${tasks.map((task) => ({
    key: `${task.agent_id}/${task.task_id}`,
    href: to(["tasks", task.agent_id, task.task_id]),
    cells: [
      task.name || task.task_id,
      ...(without === "agent" ? [] : [html`<a href=${to(["agents", task.agent_id])}>${task.agent_id}</a>`]),
      html`<${Status} value=${task.status} />`,
      `${task.attempts} of ${task.max_attempts}`,
      html`<${When} at=${task.created_at} />`,
      task.error ? html`<span class="cut" title=${task.error}>${task.error}</span>` : "",
    ],
  }))} />`;
}

/** @param {{query: URLSearchParams}} props */
function TaskList({ query }) {
  const [status, name, agent, error, after] = ["status", "name", "agent", "error", "after"].map((one) => query.get(one));
  const oldest_first = query.get("order") === "oldest" ? true : null;
  const path = api(["tasks"], { status, name, agent_id: agent, error, after, oldest_first, limit: 50 });
  /** @type {import("../ui.js").Found<Api["TaskPage"]>} */
  const found = useData(path, ["tasks"]);
  const chosen = { status: status ? [status] : [], name, agent_id: agent, error };
  return html`<${Heading} title="Tasks">${hasRuntime.value &&
      ACTIONS.filter(([, , of]) => !status || of.some((one) => one === status)).map(
        ([action, label]) => html`<${Many} key=${action} label=${label} what=${["task", "tasks"]} filter=${chosen} danger=${action !== "retry"}
          operate=${(/** @type {boolean} */ dry_run) => post("api/tasks", { action, filter: chosen, dry_run })}>
          ${action === "retry" && !status && html`<p>Dead and failed ones; choose a status for others.</p>`}<//>`,
      )}<//>
    <${Filters} fields=${[
      { name: "status", label: "Status", options: STATUSES },
      { name: "name", label: "Name" },
      { name: "agent", label: "Agent" },
      { name: "error", label: "Error" },
      { name: "order", label: "Order", options: ["oldest"], any: "newest first" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${TaskTable} tasks=${found.data.items} /><${Pager} next=${found.data.next} />`}<//>`;
}

/** @param {{agent: string, id: string}} props */
function Task({ agent, id }) {
  /** @type {import("../ui.js").Found<Api["Task"]>} */
  const found = useData(api(["agents", agent, "tasks", id]), ["tasks"], [agent, id]);
  const task = found.data;
  const operate = (/** @type {keyof typeof DONE} */ action) =>
    attempt(async () => {
      const { body } = await post("api/tasks", { action, tasks: [`${agent}/${id}`] });
      const [reason] = Object.values(body.refused);
      if (reason) throw new ApiError(409, "conflict", `It was left as it is: ${reason}`);
      if (action === "delete") go(to(["tasks"]));
    }, `The task ${DONE[action]}.`);
  return html`<${Heading} title=${task?.name || id} about=${html`Task <code>${id}</code> of <a href=${to(["agents", agent])}>${agent}</a>`}>
      ${task && hasRuntime.value && ACTIONS.filter(([, , of]) => of.some((one) => one === task.status)).map(
        ([action, label]) => html`<${DialogButton} key=${action} label=${label} title=${`${label}: 1 task`} danger=${action !== "retry"}
          action=${label} onSubmit=${() => operate(action)}><p>${task.name} of ${agent}</p><//>`,
      )}<//>
    <${Loaded} found=${found}>${task && html`
      <${Facts} of=${[
        ["Status", html`<${Status} value=${task.status} />`],
        ["Attempts", `${task.attempts} of ${task.max_attempts}${task.forgiven ? `, ${task.forgiven} of them forgiven` : ""}${task.interruptions ? `, ${task.interruptions} interrupted` : ""}`],
        ["Priority", task.priority],
        ["Submitted", html`<${When} at=${task.created_at} />`],
        ["Begun", task.started_at && html`<${When} at=${task.started_at} />`],
        ["Finished", task.finished_at && html`<${When} at=${task.finished_at} />`],
        ["Next attempt", task.not_before && html`<${When} at=${task.not_before} />`],
        ["Time limit", task.timeout_seconds && `${task.timeout_seconds} s`],
        ["Sent by", task.sent_by && html`<a href=${to(["tasks", task.sent_by.agent_id, task.sent_by.task_id])}>${task.sent_by.task_id}</a>`],
        ["File", html`<a href=${documentPlace("tasks", [agent, id])}><code>tasks/${agent}/${id}.json</code></a>`],
      ]} />
      ${task.error && html`<section><h2>Error</h2><p class="failure">${task.error}</p>
        ${task.traceback && html`<pre tabindex="0" role="region" aria-label="Traceback">${task.traceback}</pre>`}</section>`}
      ${Object.keys(task.steps).length > 0 && html`<section><h2>Steps</h2><${Table} label="Steps" columns=${["Step", "Status", "Attempt", "Result"]}
        rows=${Object.entries(task.steps).map(([name, step]) => ({
          key: name,
          cells: [name, html`<${Status} value=${step.status} />`, step.attempt, html`<code class="cut">${step.error ?? JSON.stringify(step.result)}</code>`],
        }))} /></section>`}
      ${Object.keys(task.progress).length > 0 && html`<section><h2>Progress</h2><${Json} value=${task.progress} label="Progress" /></section>`}
      <section><h2>Payload</h2><${Json} value=${task.payload} label="Payload" /></section>
      ${task.status === "completed" && html`<section><h2>Result</h2><${Json} value=${task.result} label="Result" /></section>`}`}<//>`;
}
