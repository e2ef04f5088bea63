// @ts-check
/** What changed last: what this page has seen, and what the server still knows from before. */
import { seen } from "../live.js";
import { Heading, Loaded, html, useData } from "../ui.js";
import { Feed } from "./feed.js";

export function Changes() {
  /** @type {import("../ui.js").Found<Api["ChangedDocumentPage"]>} */
  const found = useData("api/changes?limit=100");
  const earlier = found.data?.items ?? [];
  const here = new Set(seen.value.map(({ change }) => `${change.kind}/${change.key.join("/")}/${change.revision}`));
  const shown = earlier
    .filter((one) => !here.has(`${one.kind}/${one.key.join("/")}/${one.revision}`))
    .map((one) => ({ id: one.id, change: one }));
  return html`<${Heading} title="Changes" about="As they happen, whichever process or person makes them." />
    <${Loaded} found=${found}><section aria-live="off"><${Feed} changes=${seen.value} />
    ${shown.length > 0 && html`<h2>Before</h2><${Feed} changes=${shown} />`}</section><//>`;
}
