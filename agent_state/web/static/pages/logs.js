// @ts-check
/** Logs as they are stored, one record a line. */
import { api } from "../api.js";
import { requery, to } from "../router.js";
import { Filters, Heading, Json, Loaded, Table, html, useData } from "../ui.js";

/** @param {{parts: string[], query: URLSearchParams}} props */
export const Logs = ({ parts: [kind, ...key], query }) =>
  kind && key.length ? html`<${Log} kind=${kind} logKey=${key} query=${query} />` : html`<${LogNames} query=${query} />`;

/** @param {{query: URLSearchParams}} props */
function LogNames({ query }) {
  const kind = query.get("kind") || "conversations";
  /** @type {import("../ui.js").Found<Api["LogViewPage"]>} */
  const found = useData(api(["logs"], { kind }));
  return html`<${Heading} title="Logs" about="Conversations and whatever else is kept record by record." />
    <${Filters} fields=${[{ name: "kind", label: "Kind", any: "conversations" }]} />
    <${Loaded} found=${found}>${found.data && html`<${Table} label="Logs" columns=${["Log", "File"]} empty=${`There is no log of the kind ${kind}.`}
      rows=${found.data.items.map((log) => ({
        key: log.key.join("/"),
        href: to(["logs", log.kind, ...log.key]),
        cells: [log.key.join(" / "), html`<code>${log.path}</code>`],
      }))} />`}<//>`;
}

/** @param {{kind: string, logKey: string[], query: URLSearchParams}} props */
function Log({ kind, logKey, query }) {
  const last = Number(query.get("last")) || 50;
  /** @type {import("../ui.js").Found<Api["LogLinePage"]>} */
  const found = useData(api(["logs", kind], { key: logKey, last }), [kind, "sessions"]);
  const lines = found.data?.items ?? [];
  return html`<${Heading} title=${logKey.join(" / ")} about=${`Log of the kind ${kind}`} />
    <${Loaded} found=${found}>
    ${lines[0]?.seq > 1 && html`<p><button type="button" onClick=${() => requery({ last: String(Math.min(1000, last * 2)) }, { replace: true })}>Show more</button></p>`}
    ${lines.length === 0 && html`<p class="empty">This log has no records.</p>`}
    <ol class="records">${lines.map((line) => html`<li key=${line.seq} value=${line.seq}>
      <${Json} value=${line.record} label=${`Record ${line.seq}`} /></li>`)}</ol><//>`;
}
