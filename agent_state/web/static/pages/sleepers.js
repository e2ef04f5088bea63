// @ts-check
import { api, post } from "../api.js";
import { to } from "../router.js";
import {
  ActionButton, Filters, Heading, Loaded, Many, Pager, Table, Unusable, When, hasRuntime, html, useData,
} from "../ui.js";

/** @param {{query: URLSearchParams}} props */
export function Sleepers({ query }) {
  const [text, latest_first] = [query.get("text"), query.get("order") === "latest" || null];
  /** @type {import("../ui.js").Found<Api["SleepPage"]>} */
  const found = useData(api(["sleepers"], { text, latest_first, after: query.get("after") }), ["sleep"]);
  return html`<${Heading} title="Sleepers" about="Agents that begin no task until they wake.">${hasRuntime.value &&
      html`<${Many} label="Wake" what=${["sleeper", "sleepers"]} filter=${{ text }}
        operate=${(/** @type {boolean} */ dry_run) => post("api/sleepers", { text, dry_run })} />`}<//>
    <${Filters} fields=${[
      { name: "text", label: "Agent or reason" },
      { name: "order", label: "Order", options: ["latest"], any: "soonest first" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Unusable} page=${found.data} />
      <${Table} label="Sleepers" columns=${["Agent", "Since", "Until", "Woken by", "Reason", ""]} empty="No agent sleeps."
        rows=${found.data.items.map((sleep) => ({
          key: sleep.agent_id,
          href: to(["agents", sleep.agent_id]),
          cells: [
            sleep.agent_id,
            html`<${When} at=${sleep.sleep_started} />`,
            html`<${When} at=${sleep.sleep_until} />`,
            sleep.wake_events.join(", ") || "–",
            sleep.reason || "–",
            hasRuntime.value && html`<${ActionButton} label="Wake" done=${`${sleep.agent_id} is awake.`} work=${() => post(api(["agents", sleep.agent_id, "wake"]))} />`,
          ],
        }))} /><${Pager} next=${found.data.next} />`}<//>`;
}
