/** What is on the screen, as lines of Python that read it. */

import { placesOf, STRONGEST, windowOf, WINDOW } from "./store.js";
import { index, scenario, view, zoomed } from "./state.js";

/** @param {string} text */
const quoted = (text) => JSON.stringify(text);

/** The trace of the scenario. A bundle does not know where the run is, only its name. */
function opened() {
  const { call, arguments: given } = index.source ?? { call: "open_run", arguments: quoted(index.title) };
  const chosen = call === "open_run" ? `[${quoted(view.scenario)}].to_dataset()` : "";
  return `import zarrtrace as zt\n\nds = zt.${call}(${given})${chosen}\n`;
}

/** The dimensions of layers and queries of an array of attention, as the store calls them. @param {string} name */
function dims(name) {
  const array = scenario().arrays[name];
  return { layer: array.dims[0], query: array.row || "query" };
}

/** Labels of the window of a long prompt. @param {string} dim @param {number} first */
function within(dim, first) {
  const tokens = scenario().tokens.length;
  if (tokens <= WINDOW) return "";
  return `, ${dim}=slice(${first}, ${Math.min(tokens, first + WINDOW) - 1})`;
}

/** The chosen matrix, or all heads of its layer. @param {boolean} heads */
function matrix(heads) {
  const array = view.head < 0 && !heads ? "attention_mean" : "attention";
  const { layer } = dims(array), head = heads || view.head < 0 ? "" : `, head=${view.head}`;
  const part = heads ? null : zoomed();
  const within_ = part ? `, ${dims(array).query}=slice(${part.rows.join(", ")}), key=slice(${part.columns.join(", ")})` : window_(array);
  return `ds.${array}.sel(${layer}=${view.layer}${head}${within_})`;
}

/** Labels of the windows of a long prompt that the matrices show. @param {string} array */
function window_(array) {
  return within(dims(array).query, windowOf(view.token, scenario().tokens.length)) + within("key", view.window);
}

/** All layers. */
function layers() {
  const chosen = window_("attention_mean").slice(2);
  return chosen ? `ds.attention_mean.sel(${chosen})` : "ds.attention_mean";
}

/** Attention of the chosen token to the map's place, by layer and head. */
function map() {
  const place = /** @type {HTMLSelectElement} */ (document.getElementById("place")).value;
  const row = `ds.attention.sel(${dims("attention").query}=${view.token})`;
  if (place !== STRONGEST && placesOf(scenario()).includes(place)) {
    return `${row}.sel(key=ds.zt.span(${quoted(place)})).sum("key", skipna=False)`;
  }
  return `${row}.drop_sel(key=[${[...new Set([0, view.token])].join(", ")}]).max("key")`;
}

/** By the id of a panel, what its picture shows. @type {Record<string, () => string>} */
export const slices = {
  "map-panel": () => opened() + map(),
  "flow-panel": () => `${opened()}ds.attention_mean.sel(${dims("attention_mean").query}=${view.token}${within("key", view.window)})`,
  "large-panel": () => opened() + matrix(false),
  "heads-panel": () => opened() + matrix(true),
  "layers-panel": () => opened() + layers(),
  "feature-panel": () => `${opened()}ds.${view.sae}.sel(${view.sae.replace("features", "feature")}=${view.feature})`,
};
