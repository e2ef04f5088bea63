// @ts-check
import { api } from "../api.js";
import { Filters, Heading, Loaded, Pager, Table, When, html, useData } from "../ui.js";

const KINDS = ["agents", "tasks", "mail", "sessions", "sleep"];

/** @param {{query: URLSearchParams}} props */
export function Quarantine({ query }) {
  const [kind, text, after] = ["kind", "text", "after"].map((one) => query.get(one));
  const oldest_first = query.get("order") === "oldest" || null;
  /** @type {import("../ui.js").Found<Api["QuarantinedDocumentPage"]>} */
  const found = useData(api(["quarantine"], { kind, text, oldest_first, after }), KINDS);
  return html`<${Heading} title="Quarantine" about="Files that could not be used. Mend one with an editor, and move it back to where it was." />
    <${Filters} fields=${[
      { name: "kind", label: "Kind", options: KINDS },
      { name: "text", label: "File or reason" },
      { name: "order", label: "Order", options: ["oldest"], any: "newest first" },
    ]} />
    <${Loaded} found=${found}>${found.data && html`<${Table} label="Quarantine" columns=${["File", "It was", "Reason", "Since"]}
      empty="Every file can be read." rows=${found.data.items.map((one) => ({
        key: one.path,
        cells: [html`<code>${one.path}</code>`, one.was ? html`<code>${one.was}</code>` : "–", one.reason, html`<${When} at=${one.at} />`],
      }))} /><${Pager} next=${found.data.next} />`}<//>`;
}
