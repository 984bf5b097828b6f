/** Two scenarios side by side, and their difference, aligned by span. */

import { align, between } from "./align.js";
import { chosenBlock, colours } from "./attention.js";
import { element, fail, heat, number, tokenText } from "./draw.js";
import { cells, promptEnd, scale, tokenRuler } from "./plot.js";
import { continuations, nameOfToken } from "./prompt.js";
import { choose, scenario, view } from "./state.js";
import { WINDOW } from "./store.js";

/** @typedef {import("./align.js").Unit} Unit */
/** @typedef {import("./types.js").Scenario} Scenario */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const canvas = (/** @type {string} */ id) => /** @type {HTMLCanvasElement} */ ($(id));

/** @param {Scenario} of @param {[number, number]} range */
const textOf = (of, range) => of.tokens.slice(...range).join("");

const PICTURES = ["compare-a", "compare-b", "compare-difference"];
/** What is drawn. @type {{a: Scenario, b: Scenario, units: Unit[], values: Float32Array[]} | null} */
let drawn = null;

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
    // Both on the scale of the larger one, or they could not be compared.
    const [one, other] = [colours(inA.of), colours(inB.of)];
    const both = one.max >= other.max ? one : other;
    drawn = { a, b, units, values: [left, right, difference] };
    PICTURES.forEach((id, i) => {
      const options = i === 2 ? { max: most, difference: true } : both;
      heat(canvas(id), drawn?.values[i] || left, 0, n, n, options);
      const of = i === 1 ? b : a, tokens = units.map((unit) => (i === 1 ? unit.b : unit.a));
      for (const way of ["down", "across"]) tokenRuler(`${id}-${way}`, of, tokens, false);
      promptEnd(canvas(id), of, tokens, tokens);
    });
    scale("compare-scale", { max: both.max });
    scale("compare-range", { max: most, difference: true });
    $("compare-name-a").textContent = `A: ${a.name}`;
    $("compare-name-b").textContent = `B: ${b.name}`;
    $("compare-pair").textContent = `${a.name} − ${b.name}`;
    const query = units.findIndex((unit) => unit.a[0] <= view.token && view.token < unit.a[1]);
    rows(a, b, units, left, right, query);
    point(Math.max(0, query), strongest(difference, Math.max(0, query), n));
    await nextTokens(a, b, query < 0 ? -1 : units[query].b[1] - 1);
  } catch (error) {
    drawn = null;
    fail(panel, error);
  }
}

/**
 * The chosen token's attention in both, largest difference first.
 * @param {Scenario} a @param {Scenario} b @param {Unit[]} units
 * @param {Float32Array} left @param {Float32Array} right @param {number} query unit
 */
function rows(a, b, units, left, right, query) {
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

/** @param {Float32Array} values (n, n) @param {number} row @param {number} n */
function strongest(values, row, n) {
  let best = 0;
  for (let i = 1; i < n; i++) {
    if (!(Math.abs(values[row * n + i]) <= Math.abs(values[row * n + best]))) best = i;
  }
  return best;
}

/** @param {number} row @param {number} column */
function show(row, column) {
  if (!drawn) return;
  const { a, b, units, values } = drawn, n = units.length;
  const [x, y, difference] = values.map((of) => number(of[row * n + column]));
  const from = units[row], to = units[column];
  $("compare-cell").replaceChildren(
    "A: ", tokenText(textOf(a, from.a)), " → ", tokenText(textOf(a, to.a)), " = ", x,
    "; B: ", tokenText(textOf(b, from.b)), " → ", tokenText(textOf(b, to.b)), " = ", y, "; A − B = ", difference);
}

const pointers = PICTURES.map((id) => cells(canvas(id),
  () => (drawn ? [drawn.units.length, drawn.units.length] : [0, 0]), show,
  (row) => drawn && choose({ token: Math.max(drawn.units[row].a[0], drawn.units[row].a[1] - 1) })));

/** @param {number} row @param {number} column */
const point = (row, column) => pointers.forEach((to) => to(row, column));

/**
 * What the model says next after the chosen token and after its partner.
 * @param {Scenario} a @param {Scenario} b @param {number} partner token of b, -1 for none
 */
async function nextTokens(a, b, partner) {
  const out = $("compare-next");
  const token = view.token;
  const [inA, inB] = await Promise.all([continuations(a, token), partner < 0 ? null : continuations(b, partner)]);
  if (token !== view.token || drawn?.a !== a || drawn.b !== b) return;
  if (!inA || !inB) {
    out.replaceChildren(element("tr", {}, element("td", { colspan: "4" }, "not stored for both")));
    return;
  }
  const both = [...new Set([...inA.keys(), ...inB.keys()])]
    .map((id) => ({ id, x: inA.get(id) ?? NaN, y: inB.get(id) ?? NaN }))
    .sort((p, q) => Math.max(q.x || 0, q.y || 0) - Math.max(p.x || 0, p.y || 0))
    .slice(0, 8);
  out.replaceChildren(...both.map(({ id, x, y }) =>
    element("tr", { "data-token-id": String(id) }, element("td", {}, ...nameOfToken(a, id)),
      element("td", {}, number(x)), element("td", {}, number(y)), element("td", {}, number(x - y)))));
}
