// @ts-check
/** A document as it is stored: shown, edited, and beside its earlier versions. */
import { useState } from "../vendor/libraries.mjs";
import { ApiError, api, get, request } from "../api.js";
import { go } from "../router.js";
import {
  Facts, Field, Heading, Json, Loaded, When, attempt, documentPath, documentPlace, html, text, typedJson, useData, writable,
} from "../ui.js";
import { diff } from "./diff.js";

/** @param {{parts: string[]}} props */
export const Documents = ({ parts: [kind, ...key] }) =>
  kind && key.length ? html`<${Document} kind=${kind} docKey=${key} />` : html`<${Find} />`;

function Find() {
  const submit = (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    const data = new FormData(/** @type {HTMLFormElement} */ (event.currentTarget));
    go(documentPlace(text(data, "kind"), text(data, "key").split("/").filter(Boolean)));
  };
  return html`<${Heading} title="Documents" about="Any document, by its kind and its key." />
    <form class="filters" onSubmit=${submit}><label>Kind <input name="kind" required placeholder="agents" /></label>
    <label>Key <input name="key" required placeholder="alice" /></label><button type="submit" class="primary">Show</button></form>`;
}

/** @param {{kind: string, docKey: string[]}} props */
function Document({ kind, docKey: key }) {
  /** @type {import("../ui.js").Found<Api["DocumentView"]>} */
  const found = useData(documentPath(kind, key), [kind], key);
  const [draft, setDraft] = useState(/** @type {{text: string, etag: string | null} | null} */ (null));
  const [busy, setBusy] = useState(false);
  const document = found.data;
  const pretty = JSON.stringify(document?.body ?? {}, null, 2);
  const stale = draft && found.etag !== draft.etag;
  const save = async (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    if (!draft || busy) return;
    setBusy(true);
    const saved = await attempt(async () => {
      const body = typedJson(draft.text);
      try {
        await request("PUT", documentPath(kind, key), { body: { body }, headers: { "If-Match": draft.etag ?? "*" } });
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 412) throw error;
        throw new ApiError(412, error.code, "It has changed since you began. Copy your text, and begin again from what it is now.");
      }
    }, "The document is saved.").finally(() => setBusy(false));
    if (saved) {
      setDraft(null);
      found.reload();
    }
  };
  return html`<${Heading} title=${key.join(" / ")} about=${`Document of the kind ${kind}`}>
      ${document && writable.value && !draft && html`<button type="button" onClick=${() => setDraft({ text: pretty, etag: found.etag })}>Edit</button>`}<//>
    <${Loaded} found=${found}>${document && html`
      <${Facts} of=${[
        ["Revision", String(document.revision)],
        ["Saved", html`<${When} at=${document.saved_at} />`],
        ["Written by", document.edited ? "a person or another program" : "agent_state"],
        ["Schema", document.schema_name],
        ["File", html`<code>${document.path}</code>`],
      ]} />
      ${draft
        ? html`<form class="edit" onSubmit=${save}>
            ${stale && html`<p class="failure" role="alert">It has changed since you began.</p>`}
            <${Field} label="Content (JSON)"><textarea name="body" rows="24" spellcheck=${false} value=${draft.text}
              onInput=${(/** @type {any} */ event) => setDraft({ ...draft, text: event.currentTarget.value })}></textarea><//>
            <div class="actions"><button type="button" onClick=${() => setDraft(null)}>Leave it</button>
            <button type="submit" class="primary" aria-busy=${busy}>Save</button></div></form>`
        : html`<${Json} value=${document.body} label="Content" />`}
      <${History} kind=${kind} docKey=${key} />`}<//>`;
}

/** @param {{kind: string, docKey: string[]}} props */
function History({ kind, docKey: key }) {
  const [versions, setVersions] = useState(/** @type {Api["DocumentVersion"][] | null} */ (null));
  const show = () =>
    attempt(async () => setVersions((await get(api(["history", kind], { key }))).body.items));
  if (!versions) return html`<p><button type="button" onClick=${show}>Earlier versions</button></p>`;
  return html`<section><h2>Earlier versions</h2>${versions.length < 2 && html`<p class="empty">None is known.</p>`}
    <ol class="versions">${versions.slice(1).map((older, i) => html`<li key=${i}>
      <p class="by">${older.source === "git" ? html`Commit <code>${older.commit?.slice(0, 10)}</code> by ${older.author}: ${older.message}` : "Snapshot"}${
        older.revision !== null && `, revision ${older.revision}`
      }, <${When} at=${older.at} /></p>
      <${Difference} from=${older.body} to=${versions[i].body} /></li>`)}</ol></section>`;
}

/** @param {{from: unknown, to: unknown}} props */
function Difference({ from, to: now }) {
  const lines = diff(JSON.stringify(from, null, 2).split("\n"), JSON.stringify(now, null, 2).split("\n"));
  if (!lines.some(([sign]) => sign !== " ")) return html`<p class="empty">The same content.</p>`;
  return html`<pre class="diff" tabindex="0" role="region" aria-label="What changed after it">${lines.map(([sign, line], i) =>
    sign === "+" ? html`<ins key=${i}>+ ${line}${"\n"}</ins>` : sign === "-" ? html`<del key=${i}>- ${line}${"\n"}</del>` : `  ${line}\n`)}</pre>`;
}
