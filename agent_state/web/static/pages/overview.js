// @ts-check
/** What a person wants to see first. */
import { useEffect } from "../vendor/libraries.mjs";
import { seen } from "../live.js";
import { to } from "../router.js";
import { Facts, Heading, Loaded, Status, Table, addedRoutes, duration, html, mode, number, useData } from "../ui.js";
import { Feed } from "./feed.js";

const KINDS = ["agents", "tasks", "sleep", "mail", "sessions"];
/** Other words are another program's; the server cannot filter by them. */
const KNOWN = "idle active sleeping waiting stopped pending in_progress completed failed dead cancelled".split(" ");

/** @param {{label: string, value: number, href: string, alarm?: boolean, children?: any}} props */
const Tile = ({ label, value, href, alarm, children }) => html`<li><a class=${alarm && value ? "tile alarm" : "tile"} href=${href}>
  <span class="value">${number(value)}</span> <span class="label">${label}</span>${children}</a></li>`;

/** How much of all is in which status. @param {{counts: Record<string, number>, place: string}} props */
function Bars({ counts, place }) {
  const all = Object.values(counts).reduce((sum, count) => sum + count, 0) || 1;
  return html`<ul class="bars">${Object.entries(counts).map(
    ([status, count]) => html`<li key=${status}><a href=${to([place], { status: KNOWN.includes(status) ? status : null })}><${Status} value=${status} /></a>
      <meter min="0" max=${all} value=${count} aria-label=${status}></meter> <span>${number(count)}</span></li>`,
  )}</ul>`;
}

export function Overview() {
  /** @type {import("../ui.js").Found<Api["Summary"]>} */
  const found = useData("api/summary", KINDS);
  const { data } = found;
  useEffect(() => {
    if (data) [mode.value, addedRoutes.value] = [data.mode, data.added_routes];
  }, [data]);
  return html`<${Heading} title="Overview" about=${data?.directory} />
    <${Loaded} found=${found}>${data && html`<${Summary} data=${data} />`}<//>`;
}

/** @param {{data: Api["Summary"]}} props */
function Summary({ data }) {
  return html`<ul class="tiles">
    <${Tile} label="agents" value=${data.agents} href=${to(["agents"])} />
    <${Tile} label="tasks" value=${data.tasks} href=${to(["tasks"])} />
    <${Tile} label="dead letters" value=${data.dead_letters} href=${to(["tasks"], { status: "dead" })} alarm />
    <${Tile} label="unread mail" value=${data.unread_mail} href=${to(["mail"], { status: "unread" })} />
    <${Tile} label="sleepers" value=${data.sleepers} href=${to(["sleepers"])} />
    <${Tile} label="sessions" value=${data.sessions} href=${to(["sessions"])} />
    <${Tile} label="quarantined" value=${data.quarantined} href=${to(["quarantine"])} alarm />
  </ul>
  <div class="columns">
    <section><h2>Queues</h2><${Table} label="Queues" columns=${["Agents of type", "Waiting", "Running", "Oldest due for"]}
      empty="No task waits." rows=${data.queues.map((queue) => ({
        key: queue.agent_type,
        href: to(["agents"], { type: queue.agent_type }),
        cells: [queue.agent_type || "(none)", number(queue.waiting), number(queue.running), duration(queue.oldest_seconds)],
      }))} /></section>
    <section><h2>Tasks</h2><${Bars} counts=${data.tasks_by_status} place="tasks" /></section>
    <section><h2>Agents</h2><${Bars} counts=${data.agents_by_status} place="agents" /></section>
    <section><h2>Server</h2><${Facts} of=${[
      ["Mode", data.mode],
      ["Owner", data.owner_pid && `process ${data.owner_pid}`],
      ["Agents that run here", number(data.agents_here)],
      ["Journal", data.journal && (data.journal.documents === 0 ? "every document is in its file" : `${number(data.journal.documents)} documents not yet in their files, ${duration(data.journal.oldest_seconds)}`)],
      ["Mirror", data.mirror ? `${data.mirror.state}, ${number(data.mirror.waiting)} waiting, ${duration(data.mirror.lag_seconds)} behind` : "none"],
      ["Version", data.version],
    ]} /></section>
    <section class="wide"><h2>Changes <a href=${to(["changes"])}>all</a></h2><${Feed} changes=${seen.value.slice(0, 8)} /></section>
  </div>`;
}
