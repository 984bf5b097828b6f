/** Heads of a layer, layers, one large, and the flow into the chosen token. */

import { element, fail, heat, lines, named, number, spanColour, theme } from "./draw.js";
import { cells, layerRuler, promptEnd, scale, single, tokenRuler } from "./plot.js";
import { choose, headsOf, scenario, view } from "./state.js";
import { block, placeOf, WINDOW, windowOf } from "./store.js";

/** @typedef {import("./types.js").Block} Block */
/** @typedef {import("./types.js").Scenario} Scenario */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const large = /** @type {HTMLCanvasElement} */ ($("large"));
const flowCanvas = /** @type {HTMLCanvasElement} */ ($("flow"));
const cross = $("cross");
/** @type {Block | null} */
let largeBlock = null;
let largeAt = 0;
/** Means that are drawn, and in which colours. @type {Float32Array | null} */
let drawnMeans = null;
let drawnTheme = "";
/** The flow that is drawn, (layer, key). @type {{data: Float32Array, layers: number[], firstKey: number, keys: number} | null} */
let flow = null;

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

/**
 * Make the small pictures as large as the height beside them allows.
 * @param {HTMLElement} grid @param {HTMLElement} beside the last element of the panel next to it
 */
function fit(grid, beside) {
  const box = grid.getBoundingClientRect(), count = grid.children.length;
  const top = (/** @type {HTMLElement} */ of) => /** @type {HTMLElement} */ (of.closest(".panel")).offsetTop;
  const height = beside.getBoundingClientRect().bottom - box.top;
  const label = 24, gap = 6;
  let columns = Math.max(2, Math.floor(box.width / (count > 16 ? 72 : 110)));
  if (top(grid) === top(beside) && height > 100) {
    columns = 1;
    const size = () => (box.width + gap) / columns - gap + label;
    while (columns < count && Math.ceil(count / columns) * (size() + gap) - gap > height) columns++;
  }
  grid.style.setProperty("--columns", String(columns));
}

/** Fit the grids to the page as it is laid out. */
export function fitGrids() {
  fit($("heads"), $("cell"));
  fit($("layers"), $("flow-legend"));
}

/** Greatest value of the blocks that were drawn last. @type {WeakMap<Float32Array, number>} */
const greatest = new WeakMap();

/**
 * What the strongest colour stands for: 1, but in a window of a long prompt its greatest value,
 * for far from the diagonal all values are small.
 * @param {Scenario} at @param {Block} of
 */
function most(at, of) {
  if (at.tokens.length <= WINDOW) return 1;
  let found = greatest.get(of.data);
  if (found === undefined) {
    found = 0;
    for (let i = 0; i < of.data.length; i++) if (of.data[i] > found) found = of.data[i];
    greatest.set(of.data, found);
  }
  return found || 1;
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
    const max = most(at, found);
    canvases.forEach((canvas, head) => heat(canvas, found.data, head * size, found.rows, found.columns, { max }));
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
      const max = most(at, found);
      canvases.forEach((canvas, i) => heat(canvas, found.data, i * size, found.rows, found.columns, { max }));
    }
    drawnMeans = found.data;
    drawnTheme = theme();
    showChosen();
    showFlow(at, found, layers);
  } catch (error) {
    flow = null;
    fail(panel, error);
    fail($("flow-panel"), error);
  }
}

/** @param {Scenario} at @param {Block} found @param {number[]} layers */
function showFlow(at, found, layers) {
  const row = view.token - found.firstRow, keys = found.columns;
  const data = new Float32Array(layers.length * keys);
  layers.forEach((_, i) => {
    const from = (i * found.rows + row) * keys;
    data.set(found.data.subarray(from, from + keys), i * keys);
  });
  flow = { data, layers, firstKey: found.firstColumn, keys };
  // Spread over many keys, its values are small: colours go up to the largest.
  const max = data.reduce((most, v) => (v > most ? v : most), 0);
  heat(flowCanvas, data, 0, layers.length, keys, { max });
  $("flow-token").replaceChildren(...named(at, view.token));
  tokenRuler("flow-keys", at, single(found.firstColumn, keys));
  promptEnd(flowCanvas, at, single(found.firstColumn, keys));
  layerRuler("flow-layers", layers, view.layer);
  scale("flow-scale", { max });
  const drawn = Object.entries(at.spans).map(([name, positions], i) => ({
    name, colour: spanColour(i),
    // A span that is not in the window has no value here, which is another thing than 0.
    values: layers.map((_, layer) => positions.reduce((sum, key) => {
      const column = key - found.firstColumn;
      return column < 0 || column >= keys ? NaN : sum + data[layer * keys + column];
    }, 0)),
  }));
  lines(/** @type {HTMLCanvasElement} */ ($("flow-lines")), drawn, layers, view.layer);
  const chosen = layers.indexOf(view.layer);
  $("flow-legend").replaceChildren(...drawn.map((line) => {
    const value = number(line.values[chosen]);
    value.setAttribute("data-label", "");
    const key = element("li", { "data-span": line.name }, element("span", { "data-label": "" }, line.name), value);
    key.style.setProperty("--span", line.colour);
    return key;
  }));
  let strongest = 0;
  for (let key = 1; key < keys; key++) {
    if (data[chosen * keys + key] > data[chosen * keys + strongest]) strongest = key;
  }
  pointFlow(Math.max(0, chosen), strongest);
}

const pointFlow = cells(flowCanvas, () => (flow ? [flow.layers.length, flow.keys] : [0, 0]),
  (row, column) => {
    const { data, layers, firstKey, keys } = /** @type {NonNullable<typeof flow>} */ (flow);
    $("flow-cell").replaceChildren(`L${layers[row]}: `, ...named(scenario(), view.token), " → ",
      ...named(scenario(), firstKey + column), " = ", number(data[row * keys + column], 4));
  },
  (row) => flow && choose({ layer: flow.layers[row] }));

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
    const { data, firstRow, rows, firstColumn, columns } = found.of;
    const max = most(at, found.of);
    heat(large, data, found.at * rows * columns, rows, columns, { max });
    tokenRuler("large-queries", at, single(firstRow, rows));
    tokenRuler("large-keys", at, single(firstColumn, columns));
    promptEnd(large, at, single(firstColumn, columns), single(firstRow, rows));
    scale("large-scale", { max });
    point(view.token - firstRow, strongestKey(found.of, found.at, view.token - firstRow));
  } catch (error) {
    largeBlock = null;
    fail(panel, error);
  }
}

/** @param {Block} of @param {number} at which matrix @param {number} row */
function strongestKey(of, at, row) {
  const from = (at * of.rows + row) * of.columns;
  let best = 0;
  for (let key = 1; key < of.columns; key++) if (of.data[from + key] > of.data[from + best]) best = key;
  return best;
}

const point = cells(large, () => (largeBlock ? [largeBlock.rows, largeBlock.columns] : [0, 0]),
  (row, column) => {
    const { firstRow, rows, firstColumn, columns, data } = /** @type {Block} */ (largeBlock);
    const at = scenario();
    $("cell").replaceChildren(...named(at, firstRow + row), " → ", ...named(at, firstColumn + column),
      " = ", number(data[(largeAt * rows + row) * columns + column], 4));
    cross.style.setProperty("--x", `${(100 * column) / columns}%`);
    cross.style.setProperty("--y", `${(100 * row) / rows}%`);
    cross.style.setProperty("--w", `${100 / columns}%`);
    cross.style.setProperty("--h", `${100 / rows}%`);
  },
  (row) => largeBlock && choose({ token: largeBlock.firstRow + row }));
