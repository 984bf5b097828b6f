/** Aligning two prompts: token by token where they agree, span by span where lengths differ. */

/** @typedef {import("./types.js").Scenario} Scenario */
/** @typedef {import("./types.js").Block} Block */

/**
 * Tokens of two prompts that stand for each other: [start, end) in each.
 * @typedef {{a: [number, number], b: [number, number], span: string}} Unit
 */

/**
 * Contiguous parts of spans, in order, that two prompts share.
 * @param {Scenario} a
 * @param {Scenario} b
 * @returns {{a: [number, number], b: [number, number], span: string}[]}
 */
function anchors(a, b) {
  /** @param {number[]} tokens @returns {[number, number][]} */
  const parts = (tokens) => {
    /** @type {[number, number][]} */
    const out = [];
    for (const token of [...tokens].sort((x, y) => x - y)) {
      if (out.length && out[out.length - 1][1] === token) out[out.length - 1][1]++;
      else out.push([token, token + 1]);
    }
    return out;
  };
  /** @type {Unit[]} */
  const found = [];
  for (const span of Object.keys(a.spans)) {
    const inA = parts(a.spans[span]), inB = parts(b.spans[span] || []);
    if (inA.length === inB.length) inA.forEach((part, i) => found.push({ a: part, b: inB[i], span }));
  }
  found.sort((x, y) => x.a[0] - y.a[0]);
  // Spans that overlap or stand in another order cannot all hold; the earlier ones do.
  /** @type {Unit[]} */
  const kept = [];
  for (const one of found) {
    const last = kept[kept.length - 1];
    if (!last || (one.a[0] >= last.a[1] && one.b[0] >= last.b[1])) kept.push(one);
  }
  return kept;
}

/**
 * Units of two prompts. Within a stretch between shared spans, equal tokens at its beginning and
 * end are paired; what is left in the middle is paired one by one if it is as long in both, and
 * is one unit otherwise.
 * @param {Scenario} a
 * @param {Scenario} b
 * @returns {Unit[]}
 */
export function align(a, b) {
  /** @type {Unit[]} */
  const out = [];
  /** @param {number} a0 @param {number} a1 @param {number} b0 @param {number} b1 @param {string} span */
  const stretch = (a0, a1, b0, b1, span) => {
    const pair = (/** @type {number} */ x, /** @type {number} */ y) =>
      /** @type {Unit} */ ({ a: [x, x + 1], b: [y, y + 1], span });
    if (a1 - a0 === b1 - b0) {
      for (let i = 0; i < a1 - a0; i++) out.push(pair(a0 + i, b0 + i));
      return;
    }
    while (a0 < a1 && b0 < b1 && a.tokens[a0] === b.tokens[b0]) out.push(pair(a0++, b0++));
    /** @type {Unit[]} */
    const tail = [];
    while (a0 < a1 && b0 < b1 && a.tokens[a1 - 1] === b.tokens[b1 - 1]) tail.unshift(pair(--a1, --b1));
    if (a0 < a1 || b0 < b1) out.push({ a: [a0, a1], b: [b0, b1], span });
    out.push(...tail);
  };
  let atA = 0, atB = 0;
  for (const one of anchors(a, b)) {
    stretch(atA, one.a[0], atB, one.b[0], "");
    stretch(...one.a, ...one.b, one.span);
    [atA, atB] = [one.a[1], one.b[1]];
  }
  stretch(atA, a.tokens.length, atB, b.tokens.length, "");
  return out;
}

/**
 * Attention between units: the mean over a unit's queries of the sum over a unit's keys.
 * @param {Block} of
 * @param {number} at which of its matrices
 * @param {[number, number][]} units
 * @returns {Float32Array} (unit, unit); NaN where a unit is empty or outside the block
 */
export function between(of, at, units) {
  const n = units.length;
  const out = new Float32Array(n * n).fill(NaN);
  const inside = units.map(
    ([start, end]) => start < end && start >= of.firstRow && end <= of.firstRow + of.rows &&
      start >= of.firstColumn && end <= of.firstColumn + of.columns,
  );
  const base = at * of.rows * of.columns;
  for (let q = 0; q < n; q++) {
    if (!inside[q]) continue;
    for (let k = 0; k < n; k++) {
      if (!inside[k]) continue;
      let sum = 0;
      for (let row = units[q][0]; row < units[q][1]; row++) {
        const from = base + (row - of.firstRow) * of.columns - of.firstColumn;
        for (let key = units[k][0]; key < units[k][1]; key++) sum += of.data[from + key];
      }
      out[q * n + k] = sum / (units[q][1] - units[q][0]);
    }
  }
  return out;
}
