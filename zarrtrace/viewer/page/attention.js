/** Heads of a layer, layers, one large, and the flow into the chosen token. */

import { element, fail, heat, lines, number, spanColour, theme, tokenText } from "./draw.js";
import { choose, headsOf, scenario, view } from "./state.js";
import { block, placeOf, windowOf } from "./store.js";

/** @typedef {import("./types.js").Block} Block */
/** @typedef {import("./types.js").Scenario} Scenario */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const large = /** @type {HTMLCanvasElement} */ ($("large"));
const cross = $("cross");
/** @type {Block | null} */
let largeBlock = null;
let largeAt = 0;
/** Means that are drawn, and in which colours. @type {Float32Array | null} */
let drawnMeans = null;
let drawnTheme = "";

/**
 * All heads of a layer, or null if the layer has none.
 * @param {Scenario} of @param {number} layer @param {number} row @param {number} column
 */
export async function headsBlock(of, layer, row, column) {
  const array = of.arrays.attention;
  const place = placeOf(array, layer);
  return place < 0 ? null : block(array, [place, 0], row, column);
}

/**
 * The mean of heads of all layers, or null.
 * @param {Scenario} of @param {number} row @param {number} column
 */
export async function meansBlock(of, row, column) {
  const array = of.arrays.attention_mean;
  return array ? block(array, [0], row, column) : null;
}

/**
 * The chosen matrix: a head, or the mean of heads.
 * @param {Scenario} of @param {number} row @param {number} column
 * @returns {Promise<{of: Block, at: number} | null>}
 */
export async function chosenBlock(of, row, column) {
  if (view.head < 0) {
    const at = placeOf(of.arrays.attention_mean, view.layer);
    const found = at < 0 ? null : await meansBlock(of, row, column);
    return found && { of: found, at };
  }
  const found = await headsBlock(of, view.layer, row, column);
  return found && { of: found, at: view.head };
}

/**
 * Keep as many small pictures as there are matrices.
 * @param {HTMLElement} grid @param {string[]} labels @param {(at: number) => void} picked
 * @returns {HTMLCanvasElement[]}
 */
function multiples(grid, labels, picked) {
  if (grid.dataset.labels !== labels.join()) {
    grid.dataset.labels = labels.join();
    grid.classList.toggle("few", labels.length <= 16);
    grid.replaceChildren(
      ...labels.map((label, at) => {
        const one = element("button", { type: "button", class: "multiple", "aria-label": label },
          element("canvas", { "aria-hidden": "true" }), element("span", { "data-label": "" }, label));
        one.addEventListener("click", () => picked(at));
        return one;
      }),
    );
  }
  return [...grid.querySelectorAll("canvas")];
}

/** @param {HTMLElement} grid @param {number} at */
function mark(grid, at) {
  [...grid.children].forEach((child, i) => child.setAttribute("aria-pressed", String(i === at)));
}

/** Draw the heads of the layer. */
export async function showHeads() {
  const panel = $("heads-panel"), grid = $("heads");
  const at = scenario(), layer = view.layer, token = view.token, first = view.window;
  try {
    const found = await headsBlock(at, layer, windowOf(token, at.tokens.length), first);
    if (at !== scenario() || layer !== view.layer || first !== view.window ||
      (found && found.firstRow !== windowOf(view.token, at.tokens.length))) return;
    if (!found) throw new Error(at.arrays.attention
      ? `Layer ${layer} has no attention matrix.` : "This run holds no attention.");
    fail(panel, null);
    const names = Array.from({ length: headsOf(at) }, (_, head) => `H${head}`);
    const canvases = multiples(grid, names, (head) => choose({ head: head === view.head ? -1 : head }));
    const size = found.rows * found.columns;
    canvases.forEach((canvas, head) => heat(canvas, found.data, head * size, found.rows, found.columns));
    mark(grid, view.head);
    const bits = at.arrays.attention.bits;
    $("bits").textContent = bits ? `attention rounded to ${bits} bits (±${(0.5 / 254).toFixed(3)})` : "";
  } catch (error) {
    fail(panel, error);
  }
}

/** Mark the chosen head and layer without drawing. */
export function showChosen() {
  mark($("heads"), view.head);
  mark($("layers"), scenario().arrays.attention_mean ? placeOf(scenario().arrays.attention_mean, view.layer) : -1);
}

/** Draw the layers as means of heads, and the flow into the chosen token. */
export async function showLayers() {
  const panel = $("layers-panel"), grid = $("layers");
  const at = scenario(), token = view.token, first = view.window;
  try {
    const found = await meansBlock(at, windowOf(token, at.tokens.length), view.window);
    if (at !== scenario() || token !== view.token || first !== view.window) return;
    if (!found) throw new Error("This run holds no attention.");
    fail(panel, null);
    fail($("flow-panel"), null);
    const layers = at.arrays.attention_mean.layers || [];
    const canvases = multiples(grid, layers.map((layer) => `L${layer}`), (i) => choose({ layer: layers[i], head: -1 }));
    const size = found.rows * found.columns;
    if (drawnMeans !== found.data || drawnTheme !== theme()) {
      canvases.forEach((canvas, i) => heat(canvas, found.data, i * size, found.rows, found.columns));
    }
    drawnMeans = found.data;
    drawnTheme = theme();
    showChosen();
    showFlow(at, found, layers);
  } catch (error) {
    fail(panel, error);
    fail($("flow-panel"), error);
  }
}

/** @param {Scenario} at @param {Block} found @param {number[]} layers */
function showFlow(at, found, layers) {
  const row = view.token - found.firstRow;
  const flow = new Float32Array(layers.length * found.columns);
  layers.forEach((_, i) => {
    const from = (i * found.rows + row) * found.columns;
    flow.set(found.data.subarray(from, from + found.columns), i * found.columns);
  });
  heat(/** @type {HTMLCanvasElement} */ ($("flow")), flow, 0, layers.length, found.columns);
  $("flow-axis").replaceChildren(
    element("span", { "data-label": "" }, `L${layers[0]} (top) – L${layers[layers.length - 1]}`),
    element("span", { "data-label": "" }, `key ${found.firstColumn} → ${found.firstColumn + found.columns - 1}`),
  );
  const drawn = Object.entries(at.spans).map(([name, positions], i) => ({
    name, colour: spanColour(i),
    values: layers.map((_, layer) => positions.reduce((sum, key) => {
      const column = key - found.firstColumn;
      return column < 0 || column >= found.columns ? sum : sum + flow[layer * found.columns + column];
    }, 0)),
  }));
  lines(/** @type {HTMLCanvasElement} */ ($("flow-lines")), drawn, layers, view.layer);
  const chosen = layers.indexOf(view.layer);
  $("flow-legend").replaceChildren(...drawn.map((line) => {
    const key = element("li", { "data-span": line.name },
      element("span", { "data-label": "" }, line.name), number(line.values[chosen]));
    key.style.setProperty("--span", line.colour);
    return key;
  }));
}

/** Draw the chosen matrix large. */
export async function showLarge() {
  const panel = $("large-panel");
  const at = scenario();
  const key = JSON.stringify([view.scenario, view.layer, view.head, view.token, view.window]);
  panel.dataset.wanted = key;
  try {
    const found = await chosenBlock(at, windowOf(view.token, at.tokens.length), view.window);
    if (panel.dataset.wanted !== key) return;
    if (!found) throw new Error("No attention here.");
    fail(panel, null);
    largeBlock = found.of;
    largeAt = found.at;
    heat(large, found.of.data, found.at * found.of.rows * found.of.columns, found.of.rows, found.of.columns);
    $("large-title").textContent = `L${view.layer}, ${view.head < 0 ? "mean of heads" : `head ${view.head}`}`;
    point(view.token, strongestKey(found.of, found.at, view.token));
  } catch (error) {
    largeBlock = null;
    fail(panel, error);
  }
}

/** @param {Block} of @param {number} at which matrix @param {number} query */
function strongestKey(of, at, query) {
  const from = (at * of.rows + query - of.firstRow) * of.columns;
  let best = 0;
  for (let key = 1; key < of.columns; key++) if (of.data[from + key] > of.data[from + best]) best = key;
  return of.firstColumn + best;
}

let pointed = [0, 0];

/** Show one cell. @param {number} query @param {number} key */
function point(query, key) {
  if (!largeBlock) return;
  const { firstRow, rows, firstColumn, columns, data } = largeBlock;
  query = Math.max(firstRow, Math.min(firstRow + rows - 1, query));
  key = Math.max(firstColumn, Math.min(firstColumn + columns - 1, key));
  pointed = [query, key];
  const value = data[(largeAt * rows + query - firstRow) * columns + key - firstColumn];
  const texts = scenario().tokens;
  $("cell").replaceChildren(
    `${query} `, tokenText(texts[query]), " → ", `${key} `, tokenText(texts[key]), ": ", number(value, 4));
  cross.style.setProperty("--x", `${(100 * (key - firstColumn)) / columns}%`);
  cross.style.setProperty("--y", `${(100 * (query - firstRow)) / rows}%`);
  cross.style.setProperty("--w", `${100 / columns}%`);
  cross.style.setProperty("--h", `${100 / rows}%`);
}

/** @param {PointerEvent | MouseEvent} event @returns {[number, number]} */
function cellAt(event) {
  const box = large.getBoundingClientRect();
  const of = /** @type {Block} */ (largeBlock);
  return [
    of.firstRow + Math.floor(((event.clientY - box.top) / box.height) * of.rows),
    of.firstColumn + Math.floor(((event.clientX - box.left) / box.width) * of.columns),
  ];
}

large.addEventListener("pointermove", (event) => largeBlock && point(...cellAt(event)));
large.addEventListener("click", (event) => largeBlock && choose({ token: cellAt(event)[0] }));
large.addEventListener("keydown", (event) => {
  const step = /** @type {Record<string, number[]>} */ ({
    ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] })[event.key];
  if (step) point(pointed[0] + step[0], pointed[1] + step[1]);
  else if (event.key === "Enter") choose({ token: pointed[0] });
  else return;
  event.preventDefault();
  event.stopPropagation();
});
