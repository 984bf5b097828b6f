/** A token's strongest features; one feature over layers and tokens, its words, its contrasts. */

import { bars, element, fail, heat, named, number, setNumber, tokenText, visible } from "./draw.js";
import { readUses, wordsOf } from "./contexts.js";
import { showUses } from "./drawer.js";
import { labelOf, readLabels } from "./labels.js";
import { cells, layerRuler, promptEnd, scale, single, tokenRuler } from "./plot.js";
import { activeToken, colourBy } from "./prompt.js";
import { choose, index, saesOf, scenario, view } from "./state.js";
import { file, ofFeature, ofToken, placeOf, timeline } from "./store.js";

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const search = /** @type {HTMLInputElement} */ ($("feature-number"));
const canvas = /** @type {HTMLCanvasElement} */ ($("timeline"));
const asked = /** @type {HTMLInputElement} */ ($("special"));
const SHOWN = 12;
/** @type {{data: Float32Array, layers: number, tokens: number} | null} */
let drawn = null;

/** @param {number} feature @returns {HTMLElement | null} */
function link(feature) {
  const source = (index.sources[view.sae] || {})[String(view.layer)];
  if (!source) return null;
  const href = `https://www.neuronpedia.org/${source.split("/").map(encodeURIComponent).join("/")}/${feature}`;
  return element("a", { href, target: "_blank", rel: "noopener noreferrer" }, `L${view.layer} on Neuronpedia`);
}

/** An empty row; its button chooses the feature that the row then shows. */
function ofFeatureAndValue() {
  const row = element("li", { class: "pickable" }, element("button", { type: "button", class: "feature" }),
    element("span", { class: "label" }), number(0));
  row.addEventListener("click", () => choose({ feature: Number(row.dataset.feature) }));
  return row;
}

/** The strongest features of the active token. @param {number} token */
export async function showTop(token) {
  const panel = $("features-panel"), out = $("top-features");
  const at = scenario(), layer = view.layer;
  const suffix = view.sae.slice("features".length);
  const ids = at.arrays[`top_feature${suffix}`], strengths = at.arrays[`top_activation${suffix}`];
  const place = placeOf(ids, layer);
  $("special-part").hidden = !at.special.length;
  asked.checked = view.special;
  if (!ids || place < 0) {
    fail(panel, "This run holds no features.");
    return;
  }
  if (at.special.includes(token) && !view.special) {
    fail(panel, null);
    out.replaceChildren(element("li", { class: "none" }, "left out: a special token"));
    return;
  }
  try {
    const [found, strength] = await Promise.all([ofToken(ids, token, place), ofToken(strengths, token, place),
      readLabels(index.labels ?? {}, view.sae, layer, file)]);
    if (token !== activeToken() || layer !== view.layer || at !== scenario()) return;
    fail(panel, null);
    const active = Array.from(found, (feature, i) => ({ feature, value: strength[i] })).filter((f) => Math.abs(f.value) > 0);
    const most = Math.max(1e-9, ...active.map((f) => Math.abs(f.value)));
    bars(out, active.slice(0, SHOWN), ofFeatureAndValue, (row, { feature, value }) => {
      const [name, label, shown] = row.children;
      row.dataset.feature = name.textContent = String(feature);
      setLabel(label, feature);
      row.classList.toggle("chosen", feature === view.feature);
      setNumber(/** @type {HTMLDataElement} */ (shown), value);
      return Math.abs(value) / most;
    });
    clearTimeout(soon); // words of tokens that the pointer passes over are not asked for
    soon = setTimeout(() => addWords(layer), 120);
    if (!active.length) {
      out.append(element("li", { class: "none" },
        Number.isNaN(strength[0]) ? "no SAE on this layer" : "no feature is active"));
    }
  } catch (error) {
    fail(panel, error);
  }
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let soon;

/** Write a feature's label beside its number, else its strongest words. @param {Element} out @param {number} feature */
function setLabel(out, feature) {
  const text = labelOf(view.sae, view.layer, feature) ?? wordsOf(view.sae, view.layer, feature) ?? "";
  if (out.textContent === text) return;
  out.textContent = text;
  out.setAttribute("title", text);
}

/** Read the words of the listed features that have no label, and write them. @param {number} layer */
async function addWords(layer) {
  const sae = view.sae;
  for (const row of /** @type {NodeListOf<HTMLElement>} */ ($("top-features").querySelectorAll("[data-feature]"))) {
    const feature = Number(row.dataset.feature);
    if (labelOf(sae, layer, feature)) continue;
    const found = await readUses(sae, layer, feature).catch(() => null); // the drawer says what is damaged
    if (sae !== view.sae || layer !== view.layer) return;
    if (found && Number(row.dataset.feature) === feature) setLabel(row.children[1], feature);
  }
}

/** One feature: timeline, words, contrasts. */
export async function showFeature() {
  const panel = $("feature-panel");
  const at = scenario(), feature = view.feature, array = at.arrays[view.sae];
  const saes = saesOf(at);
  const choice = /** @type {HTMLSelectElement} */ ($("sae"));
  /** @type {HTMLElement} */ (choice.parentElement).hidden = saes.length < 2;
  choice.replaceChildren(...saes.map((name) => element("option", { value: name }, name)));
  choice.value = view.sae;
  search.disabled = !array;
  if (array) search.max = String(array.shape[2] - 1);
  if (document.activeElement !== search) search.value = feature < 0 ? "" : String(feature);
  search.setCustomValidity("");
  panel.hidden = feature < 0 || !array;
  document.body.classList.toggle("has-drawer", !panel.hidden);
  if (feature < 0 || !array) {
    fail(panel, null);
    colourBy(null);
    return;
  }
  await Promise.all([drawTimeline(), showWords(), showContrasts(), showName(feature), showUses()]);
}

/** Write the feature's number, its label or else its words, and its link. @param {number} feature */
async function showName(feature) {
  const layer = view.layer, sae = view.sae;
  const links = [link(feature)].filter((l) => l !== null);
  $("feature-name").replaceChildren(`Feature ${feature} `, ...links);
  await Promise.all([readLabels(index.labels ?? {}, sae, layer, file),
    readUses(sae, layer, feature).catch(() => null)]); // showUses() says what is damaged
  const label = labelOf(sae, layer, feature) ?? wordsOf(sae, layer, feature);
  if (label && feature === view.feature && layer === view.layer) {
    $("feature-name").replaceChildren(`Feature ${feature}: ${label} `, ...links);
  }
}

async function drawTimeline() {
  const panel = $("feature-panel");
  const at = scenario(), feature = view.feature, array = at.arrays[view.sae];
  try {
    const first = view.window;
    const found = await timeline(array, feature, first);
    if (feature !== view.feature || at !== scenario() || first !== view.window || array !== at.arrays[view.sae]) return;
    fail(panel, null);
    drawn = found;
    // Some SAEs (AbsTopK) have negative activations. Those of BOS would make all others pale.
    const counts = Array.from({ length: found.tokens }, (_, i) => view.special || !at.special.includes(first + i));
    const max = found.data.reduce((most, v, i) => (counts[i % found.tokens] && Math.abs(v) > most ? Math.abs(v) : most), 0);
    const difference = found.data.some((v) => v < 0);
    heat(canvas, found.data, 0, found.layers, found.tokens, { max, difference });
    tokenRuler("timeline-tokens", at, single(first, found.tokens));
    promptEnd(canvas, at, single(first, found.tokens));
    layerRuler("timeline-layers", array.layers || [], view.layer);
    scale("timeline-scale", { max, difference });
    const place = placeOf(array, view.layer);
    colourBy(place < 0 ? null : {
      feature, values: found.data.subarray(place * found.tokens, (place + 1) * found.tokens) });
    pointAt(Math.max(0, place), view.token - first);
  } catch (error) {
    drawn = null;
    colourBy(null);
    fail(panel, error);
  }
}

const pointAt = cells(canvas, () => (drawn ? [drawn.layers, drawn.tokens] : [0, 0]),
  (row, token) => {
    const { data, tokens } = /** @type {NonNullable<typeof drawn>} */ (drawn);
    const at = scenario(), layer = (at.arrays[view.sae].layers || [])[row];
    $("timeline-cell").replaceChildren(`L${layer}, `, ...named(at, view.window + token), " = ",
      number(data[row * tokens + token]));
  },
  (row, token) => {
    const layers = scenario().arrays[view.sae].layers || [];
    choose({ layer: layers[row], token: view.window + token });
  });

/** Words that drive the feature on this layer. */
async function showWords() {
  const out = $("words");
  const { word, word_score: score, word_count: count } = index.run;
  const place = placeOf(word, view.layer), feature = view.feature;
  $("words-part").hidden = place < 0 || view.sae !== "features";
  if ($("words-part").hidden) return;
  try {
    const [ids, scores, counts] = await Promise.all(
      [word, score, count].map((array) => ofFeature(array, [place], feature)));
    if (feature !== view.feature) return;
    const rows = Array.from(ids, (id, i) => ({ text: (word.words || [])[id], score: scores[i], count: counts[i] }))
      .filter((row) => row.count > 0);
    const most = Math.max(1e-9, ...rows.map((row) => row.score));
    const make = () => element("li", {}, tokenText(""), element("span", { class: "position" }), number(0));
    bars(out, rows, make, (line, row) => {
      const [text, times, shown] = line.children;
      text.textContent = visible(row.text);
      times.textContent = `×${row.count}`;
      setNumber(/** @type {HTMLDataElement} */ (shown), row.score);
      return row.score / most;
    });
    if (!rows.length) {
      const layer = view.layer;
      const uses = (await readUses("features", layer, feature).catch(() => null))?.features[feature];
      if (feature !== view.feature || layer !== view.layer || out.childElementCount) return;
      out.append(element("li", { class: "none" }, uses && !uses.activations.length
        ? "it fires at no token but special ones"
        : "it fires at no word of these scenarios; special tokens are not counted"));
    }
  } catch (error) {
    out.replaceChildren(element("li", { class: "none" }, String(error instanceof Error ? error.message : error)));
  }
}

/** The feature between groups of scenarios, at the decision. */
async function showContrasts() {
  const out = $("contrasts");
  const array = index.run.contrast, feature = view.feature;
  const place = placeOf(array, view.layer);
  $("contrasts-part").hidden = place < 0 || view.sae !== "features";
  if ($("contrasts-part").hidden) return;
  try {
    const pairs = array.pairs || [];
    const found = await Promise.all(pairs.map((_, pair) => ofFeature(array, [pair, place], feature)));
    if (feature !== view.feature) return;
    const silent = found.every((values) => values.every(Number.isNaN));
    out.replaceChildren(...silent ? [element("tr", {}, element("td", { colspan: "7" }, "silent in all of them"))]
      : found.map((values, pair) =>
      element("tr", { "data-pair": pairs[pair].join("−") },
        element("th", { scope: "row" }, pairs[pair].join(" − ")),
        ...Array.from(values, (value) => element("td", {}, number(value))))));
  } catch (error) {
    out.replaceChildren(element("tr", {}, element("td", {}, String(error instanceof Error ? error.message : error))));
  }
}

search.addEventListener("change", () => {
  const feature = search.value.trim() === "" ? -1 : Number(search.value);
  const most = Number(search.max);
  const known = Number.isInteger(feature) && feature >= -1 && feature <= most;
  search.setCustomValidity(known ? "" : `This SAE has the features 0 to ${most}.`);
  if (known) choose({ feature });
  else search.reportValidity();
});
search.addEventListener("input", () => search.setCustomValidity(""));
$("feature-close").addEventListener("click", () => {
  choose({ feature: -1 });
  search.focus();
});
asked.addEventListener("change", () => choose({ special: asked.checked }));
$("sae").addEventListener("change", (event) =>
  choose({ sae: /** @type {HTMLSelectElement} */ (event.target).value }));
