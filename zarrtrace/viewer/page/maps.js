/** Attention of the chosen token to a span, by layer and head; where it is strongest. */

import { element, fail, heat, named, number, theme } from "./draw.js";
import { cells, headRuler, layerRuler, scale } from "./plot.js";
import { choose, scenario, view } from "./state.js";
import { placesOf, STRONGEST, toSpans } from "./store.js";

/** @typedef {import("./types.js").Scenario} Scenario */
/** @typedef {import("./types.js").Opening} Opening */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const canvas = /** @type {HTMLCanvasElement} */ ($("map"));
const choice = /** @type {HTMLSelectElement} */ ($("place"));
/** The map that is drawn, (layer, head). @type {{data: Float32Array, layers: number[], heads: number} | null} */
let drawn = null;
/** Of which token and place it is, and in which colours. */
let drawnLook = "";

/** @param {string} place */
const inWords = (place) => (place === STRONGEST ? "one token, not the first" : place);

/** Places that a token can be said to look back at: no span that holds it. @param {Scenario} of @param {number} token */
function candidates(of, token) {
  // No span that comes after it, either: it cannot attend to that.
  const spans = placesOf(of).filter((place) =>
    place !== STRONGEST && !of.spans[place]?.includes(token) && of.spans[place]?.some((at) => at < token));
  return spans.length ? spans : [STRONGEST];
}

/**
 * Where a token's attention to a span is strongest: what the page opens on.
 * @param {Scenario} of @param {number} token @param {string} [only] consider this place alone
 * @returns {Promise<Opening | null>} null if its attention is not stored
 */
export async function finding(of, token, only = "") {
  const array = of.arrays.attention_to_spans;
  if (!array || !array.layers) return null;
  const [, , heads, places] = array.shape, names = placesOf(of);
  const data = await toSpans(array, token);
  /** @type {Opening | null} */
  let best = null;
  for (const place of only ? [only] : candidates(of, token)) {
    const at = names.indexOf(place);
    if (at < 0) continue;
    for (let i = 0; i < array.layers.length * heads; i++) {
      const value = data[i * places + at];
      if (value > (best ? best.value : 0)) {
        best = { layer: array.layers[Math.floor(i / heads)], head: i % heads, place, value };
      }
    }
  }
  return best;
}

/** Draw the map of layers and heads, and say where it is strongest. */
export async function showMap() {
  const panel = $("map-panel"), at = scenario(), token = view.token;
  const key = JSON.stringify([view.scenario, view.token, view.place]);
  panel.dataset.wanted = key;
  const array = at.arrays.attention_to_spans;
  try {
    if (!array || !array.layers) throw new Error("This run holds no attention.");
    const [data, strongest] = await Promise.all([toSpans(array, token), finding(at, token, view.place)]);
    if (panel.dataset.wanted !== key) return;
    fail(panel, null);
    const look = [key, view.scale, theme()].join(), heads = array.shape[2];
    if (drawnLook !== look) draw(data, array.layers, heads, strongest);
    drawnLook = look;
    layerRuler("map-layers", array.layers, view.layer);
    headRuler("map-heads", heads, view.head);
    const row = array.layers.indexOf(view.layer);
    pointAt(Math.max(0, row), Math.max(0, view.head));
  } catch (error) {
    drawn = null;
    drawnLook = "";
    fail(panel, error);
    $("map-finding").textContent = "";
  }
}

/**
 * Draw what layer and head do not change.
 * @param {import("./store.js").Values} data (layer, head, place) @param {number[]} layers @param {number} heads
 * @param {Opening | null} strongest
 */
function draw(data, layers, heads, strongest) {
  const at = scenario(), token = view.token, names = placesOf(at);
  const place = view.place || strongest?.place || candidates(at, token)[0];
  choice.replaceChildren(...names.map((name) => element("option", { value: name }, inWords(name))));
  choice.value = place;
  const column = names.indexOf(place);
  const values = Float32Array.from({ length: layers.length * heads }, (_, i) => data[i * names.length + column]);
  drawn = { data: values, layers, heads };
  const max = view.scale === "absolute" ? 1 : values.reduce((most, v) => (v > most ? v : most), 0);
  heat(canvas, values, 0, layers.length, heads, { max, byRow: view.scale === "row" });
  scale("map-scale", { max });
  $("map-token").replaceChildren(...named(at, token));
  say(at, token, place, strongest && { ...strongest, place });
}

/** @param {Scenario} at @param {number} token @param {string} place @param {Opening | null} found */
function say(at, token, place, found) {
  const out = $("map-finding");
  if (!found) {
    const stored = drawn && drawn.data.some((value) => !Number.isNaN(value));
    out.textContent = stored ? `No head of this token attends to ${inWords(place)}.` : "Attention of this token is not stored.";
    return;
  }
  const go = element("button", { type: "button", class: "small" }, `L${found.layer} H${found.head}`);
  go.addEventListener("click", () => choose({ layer: found.layer, head: found.head }));
  out.replaceChildren(...named(at, token), ` attends most to ${inWords(place)} in `, go, ": ", number(found.value), " of its attention.");
}

const pointAt = cells(canvas, () => (drawn ? [drawn.layers.length, drawn.heads] : [0, 0]),
  (row, head) => {
    const { data, layers, heads } = /** @type {NonNullable<typeof drawn>} */ (drawn);
    $("map-cell").replaceChildren(`L${layers[row]} H${head}: `, ...named(scenario(), view.token), " → ",
      inWords(choice.value), " = ", number(data[row * heads + head]));
  },
  (row, head) => drawn && choose({ layer: drawn.layers[row], head }));

choice.addEventListener("change", () => choose({ place: choice.value }));
