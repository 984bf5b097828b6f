/** The residual stream of the chosen token: the length of its vector on every layer. */

import { boxOf, fail, lines, named, number } from "./draw.js";
import { scenario, view } from "./state.js";
import { chunk } from "./store.js";

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** Draw the norm by layer; hide the panel where the run holds no residual stream. */
export async function showResidual() {
  const panel = $("residual-panel"), at = scenario(), token = view.token, array = at.arrays.residual_norm;
  panel.hidden = !array;
  if (!array) return;
  try {
    const step = array.chunks[1], layers = array.layers || [];
    const values = await chunk(array, [0, Math.floor(token / step)]);
    if (at !== scenario() || token !== view.token) return;
    fail(panel, null);
    const norms = layers.map((_, i) => values[i * step + (token % step)]);
    $("residual-token").replaceChildren(...named(at, token));
    $("residual-hook").textContent = array.hook ? `At ${array.hook}. ` : "";
    const canvas = /** @type {HTMLCanvasElement} */ ($("residual-lines")), colour = boxOf(canvas).accent;
    lines(canvas, [{ name: "norm", colour, values: norms }], layers, view.layer);
    const chosen = layers.indexOf(view.layer);
    $("residual-value").replaceChildren(`L${view.layer}: `, number(chosen < 0 ? NaN : norms[chosen]));
  } catch (error) {
    fail(panel, error);
  }
}
