/** Two scenarios side by side, and their difference, aligned by span. */

import { align, between } from "./align.js";
import { chosenBlock } from "./attention.js";
import { element, fail, heat, number, tokenText } from "./draw.js";
import { scenario, view } from "./state.js";
import { WINDOW } from "./store.js";

/** @typedef {import("./align.js").Unit} Unit */
/** @typedef {import("./types.js").Scenario} Scenario */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const canvas = (/** @type {string} */ id) => /** @type {HTMLCanvasElement} */ ($(id));

/** @param {Scenario} of @param {[number, number]} range */
const textOf = (of, range) => of.tokens.slice(...range).join("");

/** Draw the comparison, or nothing if no other scenario is chosen. */
export async function showCompare() {
  const panel = $("compare-panel");
  panel.hidden = !view.other;
  if (!view.other) return;
  const a = scenario(), b = scenario(view.other);
  const key = JSON.stringify(view);
  panel.dataset.wanted = key;
  try {
    // Of long prompts, the window that the page shows.
    const from = a.tokens.length > WINDOW || b.tokens.length > WINDOW ? view.window : 0;
    if (from >= b.tokens.length) throw new Error(`${b.name} ends before this window.`);
    const [inA, inB] = await Promise.all([chosenBlock(a, from, from), chosenBlock(b, from, from)]);
    if (panel.dataset.wanted !== key) return;
    if (!inA || !inB) throw new Error("One of the two has no attention on this layer.");
    fail(panel, null);
    const units = align(a, b).filter((unit) =>
      unit.a[1] <= from + inA.of.rows && unit.b[1] <= from + inB.of.rows && unit.a[0] >= from && unit.b[0] >= from);
    const left = between(inA.of, inA.at, units.map((unit) => unit.a));
    const right = between(inB.of, inB.at, units.map((unit) => unit.b));
    const difference = left.map((value, i) => value - right[i]);
    const n = units.length;
    const most = difference.reduce((m, v) => (Math.abs(v) > m ? Math.abs(v) : m), 0);
    heat(canvas("compare-a"), left, 0, n, n);
    heat(canvas("compare-b"), right, 0, n, n);
    heat(canvas("compare-difference"), difference, 0, n, n, { max: most, difference: true });
    $("compare-name-a").textContent = a.name;
    $("compare-name-b").textContent = b.name;
    $("compare-pair").textContent = `${a.name} − ${b.name}`;
    $("compare-range").replaceChildren("−", number(most, 2), " … +", number(most, 2));
    rows(a, b, units, left, right);
  } catch (error) {
    fail(panel, error);
  }
}

/**
 * The chosen token's attention in both, largest difference first.
 * @param {Scenario} a @param {Scenario} b @param {Unit[]} units
 * @param {Float32Array} left @param {Float32Array} right
 */
function rows(a, b, units, left, right) {
  const query = units.findIndex((unit) => unit.a[0] <= view.token && view.token < unit.a[1]);
  const n = units.length;
  const found = query < 0 ? [] : units
    .map((unit, i) => ({ unit, x: left[query * n + i], y: right[query * n + i] }))
    .filter((row) => Number.isFinite(row.x - row.y))
    .sort((p, q) => Math.abs(q.x - q.y) - Math.abs(p.x - p.y))
    .slice(0, 8);
  $("compare-rows").replaceChildren(...found.map(({ unit, x, y }) =>
    element("tr", { "data-a": unit.a.join("-"), "data-b": unit.b.join("-") },
      element("td", {}, tokenText(textOf(a, unit.a))),
      element("td", {}, tokenText(textOf(b, unit.b))),
      element("td", {}, unit.span),
      element("td", {}, number(x)), element("td", {}, number(y)), element("td", {}, number(x - y)))));
}
