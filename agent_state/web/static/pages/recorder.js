// @ts-check
/** What the recorder counts in its log, as charts; the route is that of an installed package. */
import { useEffect } from "../vendor/libraries.mjs";
import { api } from "../api.js";
import { Facts, Filters, Heading, Loaded, Table, When, html, number, useData } from "../ui.js";

const LOOK_AGAIN_MS = 10_000;
const MOST_BARS = 12;
const MOST_COLUMNS = 60;
const [WIDTH, HEIGHT, FOOT] = [720, 160, 18];

/** @param {{query: URLSearchParams}} props */
export function RecorderPage({ query }) {
  /** @type {import("../ui.js").Found<Api["LogReport"]>} */
  const found = useData(api(["recorder", "analytics"], { score: query.get("score") }));
  const report = found.data;
  useEffect(() => {
    const timer = setInterval(found.reload, LOOK_AGAIN_MS); // messages are no documents: no event tells of them
    return () => clearInterval(timer);
  }, []);
  if (found.error?.status === 404) {
    return html`<${Heading} title="Recorder" /><p class="empty">Nothing has been recorded in this directory.</p>`;
  }
  return html`<${Heading} title="Recorder" about=${report && html`Counted <${When} at=${report.timestamp} /> by the rules ${report.rules}`} />
    <${Filters} fields=${[{ name: "score", label: "Score", options: ["spread", "legacy-flat", "legacy-nested"], any: "none" }]} />
    <${Loaded} found=${found}>${report && html`<${Report} report=${report} />`}<//>`;
}

/** @param {{report: Api["LogReport"]}} props */
function Report({ report }) {
  const { tokens, score } = report;
  const used = Object.keys(tokens.by_model).length > 0;
  return html`<${Facts} of=${[
      ["Messages", number(report.total_messages)],
      ["Different texts", `${report.distinct_is_estimate ? "about " : ""}${number(report.distinct_messages)}`],
      ["Empty", number(report.empty_messages)],
      ["Contexts", number(report.sessions.session_count)],
      ["Copies left out", report.copies_left_out && number(report.copies_left_out)],
      ["Lines left out", report.skipped_lines.count && number(report.skipped_lines.count)],
      ["Score", score.value !== null && `${score.value} of 100`],
    ]} />
    ${score.value !== null && html`<p class="remark">${score.limits}</p>
      <${Table} label="Score" columns=${["Part", "Points", "Reason"]} rows=${score.parts.map((part) => ({
        key: part.name,
        cells: [part.name, `${part.points.toFixed(2)} of ${part.most}`, part.reason],
      }))} />`}
    <div class="columns charts">
      <section class="wide"><h2>Messages by day</h2><${Columns} label="Messages by day" days=${report.timeline} /></section>
      <${Bars} title="Speakers" counts=${report.speakers} />
      <${Bars} title="Contexts" counts=${report.sessions.messages_by_session} />
      <${Bars} title="Domains" counts=${report.chain_types} />
      <${Bars} title="Tiers" counts=${report.ace_tiers} />
      <${Bars} title="Keywords" counts=${Object.fromEntries(report.keywords)} />
      <${Bars} title="Kinds of messages" counts=${report.message_types} />
      ${used && html`<section class="wide"><h2>Tokens by day</h2><${Columns} label="Tokens by day" days=${sums(tokens.by_day)} /></section>
        <${Bars} title="Tokens by model" counts=${sums(tokens.by_model)} />
        <${Bars} title="Tokens by agent" counts=${sums(tokens.by_agent)} />`}
    </div>`;
}

/** All tokens of each name. @param {Record<string, Api["TokenCounts"]>} by */
const sums = (by) =>
  Object.fromEntries(
    Object.entries(by).map(([name, one]) => [name, Object.values(one).reduce((sum, count) => sum + count, 0)]),
  );

/** A bar for each name, the largest first. @param {{title: string, counts: Record<string, number>}} props */
function Bars({ title, counts }) {
  const ranked = Object.entries(counts).sort(([, a], [, b]) => b - a);
  const shown = ranked.slice(0, MOST_BARS);
  const rest = ranked.slice(MOST_BARS).reduce((sum, [, count]) => sum + count, 0);
  if (!ranked.length) return null;
  const most = shown[0]?.[1] || 1;
  return html`<section><h2>${title}</h2><ul class="bars">${shown.map(
    ([name, count]) => html`<li key=${name}><span class="cut" title=${name}>${name}</span>
      <meter min="0" max=${most} value=${count} aria-label=${name}></meter> <span>${number(count)}</span></li>`,
  )}</ul>${rest > 0 && html`<p class="none">${number(ranked.length - MOST_BARS)} more: ${number(rest)}</p>`}</section>`;
}

/**
 * A column for each day from the first to the last, or for several days each if there are many.
 * @param {Record<string, number>} days
 * @returns {{first: string, last: string, count: number}[]}
 */
export function columnsOf(days) {
  const DAY = 86_400_000;
  const dated = Object.entries(days).map(([day, count]) => ({ at: Date.parse(day), count })).filter(({ at }) => at >= 0);
  if (!dated.length) return [];
  const begin = Math.min(...dated.map(({ at }) => at));
  const end = Math.max(...dated.map(({ at }) => at));
  const width = Math.ceil((end - begin + DAY) / DAY / MOST_COLUMNS) * DAY;
  const columns = [];
  for (let first = begin; first <= end; first += width) {
    const count = dated.filter(({ at }) => at >= first && at < first + width).reduce((sum, one) => sum + one.count, 0);
    const name = (/** @type {number} */ at) => new Date(at).toISOString().slice(0, 10);
    columns.push({ first: name(first), last: name(Math.min(end, first + width - DAY)), count });
  }
  return columns;
}

/** @param {{label: string, days: Record<string, number>}} props */
function Columns({ label, days }) {
  const columns = columnsOf(days);
  if (!columns.length) return html`<p class="empty">No message has a day.</p>`;
  const most = Math.max(1, ...columns.map(({ count }) => count));
  const step = WIDTH / columns.length;
  const floor = HEIGHT - FOOT;
  const [first, last] = [columns[0], columns[columns.length - 1]];
  return html`<svg class="chart" viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img"
      aria-label=${`${label}, ${first?.first} to ${last?.last}, at most ${number(most)}`}>
    <text x="0" y="11">${number(most)}</text><line x1="0" x2=${WIDTH} y1=${floor} y2=${floor} />
    ${columns.map(({ first: from, last: until, count }, i) => {
      const height = (count / most) * (floor - 16);
      return html`<rect key=${from} x=${i * step} y=${floor - height} width=${Math.max(1, Math.min(step * 0.85, 40))} height=${height}>
        <title>${from === until ? from : `${from} to ${until}`}: ${number(count)}</title></rect>`;
    })}
    <text x="0" y=${HEIGHT - 4}>${first?.first}</text>
    ${columns.length > 1 && html`<text x=${WIDTH} y=${HEIGHT - 4} text-anchor="end">${last?.last}</text>`}</svg>`;
}
