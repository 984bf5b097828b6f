/** The search: scenarios, tokens of the shown prompt, features by number, word or label; and the list of keys. */

import { choices, group, note, option } from "./choices.js";
import { element, tokenText, visible } from "./draw.js";
import { labelOf, labelsOf, readLabels } from "./labels.js";
import { matching, onList, readList, scenarioRow } from "./scenarios.js";
import { choose, index, scenario, view, visit } from "./state.js";
import { chunk, file, placeOf, windowOf } from "./store.js";

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const dialog = (/** @type {string} */ id) => /** @type {HTMLDialogElement} */ ($(id));
const field = /** @type {HTMLInputElement} */ ($("search-text"));
/** Results of each kind that are shown. */
const MOST = 20;
/** Tokens on either side of one that is found. */
const AROUND = 3;

/** @param {number} total @param {number} shown */
const of = (total, shown) => (total > shown ? `, ${shown} of ${total.toLocaleString("en")}` : "");

/** @param {string} query */
function scenarioResults(query) {
  const words = query.toLowerCase().split(/\s+/), found = matching(query);
  // One that is named so comes before those that have it in their metadata.
  const first = found.filter(({ name }) => words.every((word) => name.toLowerCase().includes(word)));
  const named = new Set(first.slice(0, MOST));
  for (const entry of found) {
    if (named.size >= MOST) break;
    named.add(entry);
  }
  if (!named.size) return [];
  return [group(`Scenarios${of(found.length, named.size)}`, [...named].map((one) => scenarioRow(one, words, one.name === view.scenario)))];
}

/** A token with those around it. @param {string[]} tokens @param {number} token */
function tokenRow(tokens, token) {
  const from = Math.max(0, token - AROUND);
  const around = tokens.slice(from, token + AROUND + 1).map(visible);
  const context = element("bdi", { class: "token-context" }, around.slice(0, token - from).join(""),
    element("mark", {}, around[token - from]), around.slice(token - from + 1).join(""));
  return option(`token ${token}`, { token: String(token) }, element("span", { class: "position" }, String(token)), context);
}

/** Tokens at which a text begins, which may go over several. @param {string[]} tokens @param {string} text */
function places(tokens, text) {
  const lower = tokens.map((token) => token.toLowerCase()), whole = lower.join("");
  /** @type {number[]} */
  const found = [];
  for (let from = whole.indexOf(text), token = 0, start = 0; from >= 0; from = whole.indexOf(text, from + 1)) {
    while (start + lower[token].length <= from) start += lower[token++].length;
    if (found[found.length - 1] !== token) found.push(token);
  }
  return found;
}

/** @param {string} query */
function tokenResults(query) {
  const at = scenario(), found = places(at.tokens, query.toLowerCase());
  const number = /^\d{1,9}$/.test(query) ? Number(query) : -1;
  const shown = [...new Set([...(number >= 0 && number < at.tokens.length ? [number] : []), ...found])];
  if (!shown.length) return [];
  return [group(`Tokens of ${at.name}${of(shown.length, Math.min(MOST, shown.length))}`,
    shown.slice(0, MOST).map((token) => tokenRow(at.tokens, token)))];
}

/** @param {number} feature @param {number} layer @param {(Node | string)[]} shown */
const featureRow = (feature, layer, ...shown) => option(`feature ${layer} ${feature}`,
  { feature: String(feature), layer: String(layer) }, element("span", {}, `L${layer} feature ${feature}`), ...shown);

/** @param {string} query */
function numberResults(query) {
  const array = scenario().arrays[view.sae], feature = Number(query);
  if (!array || !/^\d{1,9}$/.test(query) || feature >= array.shape[2]) return [];
  const label = labelOf(view.sae, view.layer, feature);
  return [group("Feature", [featureRow(feature, view.layer, ...(label ? [element("span", {}, label)] : []))])];
}

/** Features of the chosen layer with the text among their strongest words. @param {string} query */
async function wordResults(query) {
  const { word: array, word_count: count } = index.run, layer = view.layer, place = placeOf(array, layer);
  const wanted = query.toLowerCase();
  const ids = new Set((array?.words || []).flatMap((word, id) => (word.trim().toLowerCase().includes(wanted) ? [id] : [])));
  if (place < 0 || view.sae !== "features" || !ids.size) return [];
  const [step, ranks] = array.chunks.slice(-2), features = array.shape[1];
  /** @type {{feature: number, rank: number, id: number}[]} */
  const found = [];
  for (let part = 0; part * step < features; part++) {
    const [words, counts] = await Promise.all([chunk(array, [place, part, 0]), chunk(count, [place, part, 0])]);
    words.forEach((id, i) => {
      const feature = part * step + Math.floor(i / ranks);
      if (ids.has(id) && counts[i] && feature < features) found.push({ feature, rank: i % ranks, id });
    });
  }
  found.sort((a, b) => a.rank - b.rank);
  const every = new Map(found.reverse().map((one) => [one.feature, one])), shown = [...every.values()].reverse().slice(0, MOST);
  if (!shown.length) return [];
  return [group(`Features of L${layer} by the words that drive them${of(every.size, shown.length)}`,
    shown.map(({ feature, id }) => featureRow(feature, layer, tokenText((array.words || [])[id]))))];
}

/** Features by label: of the chosen layer first, then of the others. @param {string} query @param {() => boolean} isWanted */
async function labelResults(query, isWanted) {
  const layers = index.labels?.[view.sae] || [], wanted = query.toLowerCase();
  const found = [];
  for (const layer of [view.layer, ...layers.filter((one) => one !== view.layer)]) {
    await readLabels(index.labels ?? {}, view.sae, layer, file);
    if (!isWanted()) return [];
    for (const [feature, label] of Object.entries(labelsOf(view.sae, layer) || {})) {
      if (label.toLowerCase().includes(wanted)) found.push(featureRow(Number(feature), layer, element("span", {}, label)));
    }
    if (found.length >= MOST) break;
  }
  return found.length ? [group("Features by label", found.slice(0, MOST))] : [];
}

/** Go where a result says. @param {HTMLElement} row */
function go({ dataset }) {
  dialog("search").close();
  if (dataset.name !== undefined) visit({ scenario: dataset.name });
  else if (dataset.token !== undefined) {
    const token = Number(dataset.token);
    choose({ token, window: windowOf(token, scenario().tokens.length) });
  } else choose({ feature: Number(dataset.feature), layer: Number(dataset.layer) });
}

const results = choices(field, $("search-list"), go, () => dialog("search").open);
/** What the list shows at once, before labels and words are read. @type {HTMLElement[]} */
let atOnce = [];
/** @type {ReturnType<typeof setTimeout> | undefined} */
let later;

/** Show what is found. */
function find() {
  const query = field.value.trim();
  clearTimeout(later);
  const isWanted = () => dialog("search").open && field.value.trim() === query;
  atOnce = query ? [...numberResults(query), ...scenarioResults(query), ...tokenResults(query)]
    : [note("Scenarios by name, tag or metadata; tokens of the prompt; features by number, word or label.")];
  results.show(atOnce);
  if (!query) return;
  // Words and labels may have to be read, and not for each letter.
  later = setTimeout(async () => {
    const more = await Promise.all([labelResults(query, isWanted), wordResults(query)])
      .catch((error) => [[note(String(error instanceof Error ? error.message : error))]]);
    if (!isWanted()) return;
    const all = [...atOnce, ...more.flat()];
    results.show(all.length ? all : [note("nothing found")]);
    $("search-list").dataset.query = query;
  }, 120);
}

function open() {
  if (dialog("search").open) return;
  dialog("keys").close();
  readList();
  dialog("search").showModal();
  field.select();
  find();
}

/** @param {KeyboardEvent} event */
function keys(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  // A field that has closed with its dialog still gets keys until the browser draws again.
  const isField = target.checkVisibility() && target.closest("input:not([type=range], [type=checkbox]), select, textarea");
  const isPlain = !event.ctrlKey && !event.metaKey && !event.altKey && !isField;
  if ((isPlain && event.key === "/") || ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k")) open();
  else if (isPlain && event.key === "?" && !dialog("search").open) {
    if (!dialog("keys").open) dialog("keys").showModal();
  } else return;
  event.preventDefault();
}

/** Make the search and the list of keys open and close. */
export function startSearch() {
  document.addEventListener("keydown", keys);
  field.addEventListener("input", find);
  $("search-open").addEventListener("click", open);
  $("keys-open").addEventListener("click", () => dialog("keys").showModal());
  for (const id of ["search", "keys"]) {
    $(`${id}-close`).addEventListener("click", () => dialog(id).close());
    // Beside it: a click in it is on one of its children, or in its padding.
    dialog(id).addEventListener("pointerdown", (event) => {
      const box = dialog(id).getBoundingClientRect();
      const isIn = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
      if (!isIn) dialog(id).close();
    });
  }
  onList(() => dialog("search").open && find());
}
