/** Of a prompt shown in windows: where in all of it the chosen token attends. */

import { element, heat, named, number } from "./draw.js";
import { choose, scenario, view } from "./state.js";
import { chunk, placeOf, windowOf, WINDOW } from "./store.js";

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
/** More than this is not read for an overview. */
const MOST_BYTES = 96 * 2 ** 20;
const SHOWN = 6;

const wanted = () => JSON.stringify([view.scenario, view.layer, view.head, view.token]);

/** Take away what is not true any more; its place stays, so that nothing moves. */
export function clearOverview() {
  $("overview").hidden = scenario().tokens.length <= WINDOW;
  if ($("overview").dataset.of !== wanted()) $("overview").classList.add("stale");
}

/** Read the chosen token's row, window by window, and show it; leaves off when something else is chosen. */
export async function showOverview() {
  const at = scenario(), key = wanted(), out = $("overview");
  const array = view.head < 0 ? at.arrays.attention_mean : at.arrays.attention;
  const layer = placeOf(array, view.layer);
  if (out.dataset.of === key) out.classList.remove("stale");
  if (at.tokens.length <= WINDOW || layer < 0 || out.dataset.of === key) return;
  const [stepRows, stepKeys] = array.chunks.slice(-2);
  const count = Math.floor(view.token / stepKeys) + 1;
  if (count * array.chunks.reduce((a, b) => a * b, 4) > MOST_BYTES) return;
  const lead = view.head < 0 ? [0] : [layer, 0];
  const matrix = view.head < 0 ? layer : view.head;
  const row = new Float32Array(count * stepKeys);
  try {
    for (let i = 0; i < count; i++) {
      const values = await chunk(array, [...lead, Math.floor(view.token / stepRows), i]);
      if (key !== wanted()) return;
      const from = (matrix * stepRows + (view.token % stepRows)) * stepKeys;
      row.set(/** @type {Float32Array} */ (values.subarray(from, from + stepKeys)), i * stepKeys);
    }
  } catch {
    return; // the panels of the window say what is damaged
  }
  const sums = new Float32Array(Math.ceil(at.tokens.length / WINDOW));
  for (let i = 0; i <= view.token; i++) sums[Math.floor(i / WINDOW)] += row[i] || 0;
  heat(/** @type {HTMLCanvasElement} */ ($("overview-windows")), sums, 0, 1, sums.length);
  const strongest = Array.from(row.subarray(0, view.token + 1), (value, position) => ({ value, position }))
    .filter((one) => one.value > 0).sort((x, y) => y.value - x.value).slice(0, SHOWN);
  $("overview-keys").replaceChildren(...strongest.map(({ value, position }) => {
    const one = element("button", { type: "button", class: "small", "data-position": String(position) },
      ...named(at, position), " ", number(value));
    one.addEventListener("click", () => choose({ window: windowOf(position, at.tokens.length) }));
    return element("li", {}, one);
  }));
  out.dataset.of = key;
  out.classList.remove("stale");
}
