/** Heads of a layer, layers, one large, and the flow into the chosen token. */

import { element, fail, heat, lines, named, number, readable, spanColour, theme } from "./draw.js";
import { cells, layerRuler, promptEnd, scale, single, tokenRuler } from "./plot.js";
import { choose, headsOf, scenario, view, zoomed } from "./state.js";
import { block, placeOf, windowOf } from "./store.js";

/** @typedef {import("./types.js").Block} Block */
/** @typedef {import("./types.js").Scenario} Scenario */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const large = /** @type {HTMLCanvasElement} */ ($("large"));
const flowCanvas = /** @type {HTMLCanvasElement} */ ($("flow"));
const cross = $("cross");
/** @type {Block | null} */
let largeBlock = null;
/** Means that are drawn, and in which colours. @type {Float32Array | null} */
let drawnMeans = null;
let drawnLook = "";
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

/** Queries this early have few keys, and large weights whatever they attend to. */
const EARLY = 8;
/** Greatest value of the blocks that were drawn last. @type {WeakMap<Float32Array, number>} */
const greatest = new WeakMap();

/**
 * What the strongest colour stands for, of a block and of all pictures of it: 1, or its greatest
 * value. The first token and the first queries are left out: they would make all else pale.
 * @param {Block} of
 * @returns {{max: number, byRow: boolean, firstKey: number}} options of heat()
 */
export function colours(of) {
  const { data, count, rows, columns, firstRow, firstColumn } = of;
  const options = { max: 1, byRow: view.scale === "row", firstKey: firstColumn };
  if (view.scale === "absolute") return options;
  let found = greatest.get(data);
  if (found === undefined) {
    found = 0;
    const early = Math.min(EARLY, firstRow + rows - 1);
    for (let matrix = 0; matrix < count; matrix++) {
      for (let row = Math.max(0, early - firstRow); row < rows; row++) {
        const from = (matrix * rows + row) * columns;
        for (let key = firstColumn === 0 ? 1 : 0; key < columns; key++) if (data[from + key] > found) found = data[from + key];
      }
    }
    greatest.set(data, found);
  }
  return { ...options, max: found || 1 };
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
    const options = colours(found);
    canvases.forEach((canvas, head) => heat(canvas, found.data, head * size, found.rows, found.columns, options));
    mark(grid, view.head);
    const bits = at.arrays.attention.bits;
    $("bits").textContent = bits ? `attention rounded to ${bits} bits (±${readable(0.5 / 254)})` : "";
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
    if (drawnMeans !== found.data || drawnLook !== theme() + view.scale) {
      const options = colours(found);
      canvases.forEach((canvas, i) => heat(canvas, found.data, i * size, found.rows, found.columns, options));
    }
    drawnMeans = found.data;
    drawnLook = theme() + view.scale;
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
  const options = colours({ data, count: 1, rows: layers.length, columns: keys, firstRow: EARLY, firstColumn: found.firstColumn });
  const max = options.max;
  heat(flowCanvas, data, 0, layers.length, keys, options);
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
      ...named(scenario(), firstKey + column), " = ", number(data[row * keys + column]));
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
    const part = visiblePart(found.of, found.at);
    largeBlock = part;
    const { data, firstRow, rows, firstColumn, columns } = part;
    const options = { ...colours(found.of), firstKey: firstColumn }, max = options.max;
    heat(large, data, 0, rows, columns, options);
    $("zoom-out").hidden = !view.zoom;
    tokenRuler("large-queries", at, single(firstRow, rows));
    tokenRuler("large-keys", at, single(firstColumn, columns));
    promptEnd(large, at, single(firstColumn, columns), single(firstRow, rows));
    scale("large-scale", { max });
    point(view.token - firstRow, strongestKey(part, view.token - firstRow));
  } catch (error) {
    largeBlock = null;
    fail(panel, error);
  }
}

/** The part of a matrix that is zoomed into. @param {Block} of @param {number} at which matrix @returns {Block} */
function visiblePart(of, at) {
  const part = zoomed();
  const inside = (/** @type {number[]} */ [first, last], /** @type {number} */ from, /** @type {number} */ count) =>
    [Math.max(0, first - from), Math.min(count, last + 1 - from)];
  let [top, bottom] = part ? inside(part.rows, of.firstRow, of.rows) : [0, of.rows];
  let [left, right] = part ? inside(part.columns, of.firstColumn, of.columns) : [0, of.columns];
  if (top >= bottom || left >= right) [top, bottom, left, right] = [0, of.rows, 0, of.columns]; // in another window
  const rows = bottom - top, columns = right - left, data = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row++) {
    const from = (at * of.rows + top + row) * of.columns + left;
    data.set(of.data.subarray(from, from + columns), row * columns);
  }
  return { data, count: 1, rows, columns, firstRow: of.firstRow + top, firstColumn: of.firstColumn + left };
}

/** @param {Block} of @param {number} row */
function strongestKey(of, row) {
  if (row < 0 || row >= of.rows) return 0;
  const from = row * of.columns;
  let best = 0;
  for (let key = 1; key < of.columns; key++) if (of.data[from + key] > of.data[from + best]) best = key;
  return best;
}

/** Row and column of the cell that is pointed at. @type {[number, number]} */
let pointed = [0, 0];

const point = cells(large, () => (largeBlock ? [largeBlock.rows, largeBlock.columns] : [0, 0]),
  (row, column) => {
    const { firstRow, rows, firstColumn, columns, data } = /** @type {Block} */ (largeBlock);
    const at = scenario();
    pointed = [row, column];
    $("cell").replaceChildren(...named(at, firstRow + row), " → ", ...named(at, firstColumn + column),
      " = ", number(data[row * columns + column]));
    cross.style.setProperty("--x", `${(100 * column) / columns}%`);
    cross.style.setProperty("--y", `${(100 * row) / rows}%`);
    cross.style.setProperty("--w", `${100 / columns}%`);
    cross.style.setProperty("--h", `${100 / rows}%`);
  },
  (row) => largeBlock && choose({ token: largeBlock.firstRow + row }));

// A part of the matrix: dragged over, or halved around the cell that is pointed at.
/** @type {{x: number, y: number} | null} */
let from = null;
const drag = $("drag");

/** Where a pointer is in the matrix, from 0 to 1. @param {PointerEvent} event */
function within(event) {
  const box = large.getBoundingClientRect();
  const share = (/** @type {number} */ at, /** @type {number} */ low, /** @type {number} */ size) => Math.max(0, Math.min(1, (at - low) / size));
  return { x: share(event.clientX, box.left, box.width), y: share(event.clientY, box.top, box.height) };
}

/** @param {number} top @param {number} bottom rows of what is shown, the last one included @param {number} left @param {number} right */
function zoom(top, bottom, left, right) {
  if (!largeBlock) return;
  const { firstRow, firstColumn } = largeBlock;
  choose({ zoom: `${firstRow + top}-${firstRow + bottom},${firstColumn + left}-${firstColumn + right}` });
}

large.addEventListener("pointerdown", (event) => { from = event.button === 0 ? within(event) : null; });
large.addEventListener("pointermove", (event) => {
  if (!from || !(event.buttons & 1)) return;
  const to = within(event);
  drag.hidden = Math.abs(to.x - from.x) < 0.02 || Math.abs(to.y - from.y) < 0.02;
  drag.style.left = `${100 * Math.min(from.x, to.x)}%`;
  drag.style.top = `${100 * Math.min(from.y, to.y)}%`;
  drag.style.width = `${100 * Math.abs(to.x - from.x)}%`;
  drag.style.height = `${100 * Math.abs(to.y - from.y)}%`;
});
addEventListener("pointerup", (event) => {
  const start = from;
  from = null;
  if (!start || drag.hidden || !largeBlock) return;
  drag.hidden = true;
  const to = within(event), { rows, columns } = largeBlock;
  const cell = (/** @type {number} */ share, /** @type {number} */ count) => Math.min(count - 1, Math.floor(share * count));
  zoom(cell(Math.min(start.y, to.y), rows), cell(Math.max(start.y, to.y), rows),
    cell(Math.min(start.x, to.x), columns), cell(Math.max(start.x, to.x), columns));
  // The click that ends a drag chooses no token.
  large.addEventListener("click", (click) => click.stopImmediatePropagation(), { capture: true, once: true });
});
large.addEventListener("keydown", (event) => {
  if (event.key === "-" || event.key === "Escape") choose({ zoom: "" });
  else if (event.key === "+" && largeBlock) {
    const { rows, columns } = largeBlock;
    const half = (/** @type {number} */ at, /** @type {number} */ count) => {
      const size = Math.ceil(count / 2), first = Math.max(0, Math.min(count - size, at - Math.floor(size / 2)));
      return [first, first + size - 1];
    };
    const [row, column] = pointed;
    const [top, bottom] = half(row, rows), [left, right] = half(column, columns);
    zoom(top, bottom, left, right);
  } else return;
  event.preventDefault();
});
$("zoom-out").addEventListener("click", () => {
  choose({ zoom: "" });
  large.focus();
});
