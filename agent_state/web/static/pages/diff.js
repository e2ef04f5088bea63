// @ts-check
const MOST_CELLS = 4_000_000;
const AROUND = 3;

/**
 * What changed from some lines to others: each line with "+", "-" or " " before it. Of what stayed
 * the same, three lines around each change are shown.
 * @param {string[]} before
 * @param {string[]} after
 * @returns {[string, string][]}
 */
export function diff(before, after) {
  let start = 0;
  while (start < before.length && start < after.length && before[start] === after[start]) start++;
  let end = 0;
  while (end < Math.min(before.length, after.length) - start && before.at(-1 - end) === after.at(-1 - end)) end++;
  const a = before.slice(start, before.length - end);
  const b = after.slice(start, after.length - end);
  const middle = a.length * b.length > MOST_CELLS ? replaced(a, b) : common(a, b);
  return shorten([...same(before.slice(0, start)), ...middle, ...same(before.slice(before.length - end))]);
}

/** @param {string[]} lines @returns {[string, string][]} */
const same = (lines) => lines.map((line) => [" ", line]);

/** @param {string[]} a @param {string[]} b @returns {[string, string][]} */
const replaced = (a, b) => [.../** @type {[string, string][]} */ (a.map((line) => ["-", line])), .../** @type {[string, string][]} */ (b.map((line) => ["+", line]))];

/** By the longest common subsequence. @param {string[]} a @param {string[]} b */
function common(a, b) {
  const width = b.length + 1;
  const lengths = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      lengths[i * width + j] =
        a[i] === b[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
  /** @type {[string, string][]} */
  const lines = [];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      lines.push([" ", a[i++]]);
      j++;
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) lines.push(["-", a[i++]]);
    else lines.push(["+", b[j++]]);
  }
  return [...lines, ...replaced(a.slice(i), b.slice(j))];
}

/** @param {[string, string][]} lines @returns {[string, string][]} */
function shorten(lines) {
  const near = new Set();
  lines.forEach(([sign], i) => {
    if (sign !== " ") for (let j = i - AROUND; j <= i + AROUND; j++) near.add(j);
  });
  return lines.flatMap((line, i) => (near.has(i) ? [line] : near.has(i - 1) ? [/** @type {[string, string]} */ ([" ", "…"])] : []));
}
