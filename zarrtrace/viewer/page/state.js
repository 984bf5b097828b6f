/** What is chosen, kept in the address so that a link shows the same view. */

import { fail } from "./draw.js";
import { packed, placesOf, windowOf } from "./store.js";

/** @typedef {import("./types.js").View} View */
/** @typedef {import("./types.js").Index} Index */
/** @typedef {import("./types.js").Scenario} Scenario */

/** @type {View} */
export const view = {
  scenario: "", other: "", layer: 0, head: -1, token: 0, window: 0, feature: -1,
  sae: "features", special: false, place: "", zoom: "", scale: "panel", theme: "",
};
/** What of the address does not exist in this run, in words. @type {string[]} */
export const unknown = [];
/** What is shown if the address says no layer and no head. @type {import("./types.js").Opening | null} */
let opening = null;

/** What index.json says. @type {Index} */
export const index = /** @type {any} */ ({});
/** @type {((changed: Set<string>) => void)[]} */
const listeners = [];

/** Names of all scenarios. @type {Set<string>} */
let names = new Set();
/** Scenarios that were read. @type {Map<string, Scenario>} */
const known = new Map();

/** @param {Index} found */
export function setIndex(found) {
  Object.assign(index, found, { vocabulary: {}, sources: {} });
  names = new Set(index.scenarios);
}

/** Whether this page has a scenario. @param {string} name */
export const isHere = (name) => names.has(name);

/** The scenario of a name, or the first one. @param {string} name */
const nearest = (name) => (names.has(name) ? name : index.scenarios[0]);

/** Read a scenario, the first one if there is none of this name. @param {string} asked @returns {Promise<Scenario>} */
export async function opened(asked) {
  const name = nearest(asked);
  if (!known.has(name)) {
    const found = await packed(`data/@scenarios/${name}.json.gz`);
    Object.assign(index.vocabulary, found.vocabulary);
    for (const [sae, byLayer] of Object.entries(found.sources)) {
      index.sources[sae] = Object.assign(index.sources[sae] || {}, byLayer);
    }
    known.set(name, found);
  }
  return scenario(name);
}

/** Works that the page is at: it is ready when there is none. */
let works = 0;

/** Say that something is asked for, and not shown yet. */
export function busy() {
  works++;
  document.body.dataset.state = "busy";
}

/** Say that it is shown. */
export function done() {
  if (!--works) document.body.dataset.state = "ready";
}

/** @param {import("./types.js").Opening | null} found */
export function setOpening(found) {
  opening = found;
}

/** What the address says, or the page that stands in a notebook. */
export function asked() {
  return new URLSearchParams(location.hash.slice(1) || given?.content);
}

/** A scenario that was read. @param {string} [name] @returns {Scenario} */
export function scenario(name = view.scenario) {
  return /** @type {Scenario} */ (known.get(nearest(name)));
}

/** Number of query heads, 0 if there is no attention. @param {Scenario} of */
export function headsOf(of) {
  return of.arrays.attention ? of.arrays.attention.shape[1] : 0;
}

/** Arrays of features, by name. @param {Scenario} of */
export function saesOf(of) {
  return Object.keys(of.arrays).filter((name) => name.startsWith("features"));
}

/** @param {string | null} text @param {number} otherwise */
function whole(text, otherwise) {
  return text !== null && /^-?\d{1,9}$/.test(text) ? Number(text) : otherwise;
}

/** @param {number} value @param {number} low @param {number} high */
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/** The part of the large matrix that is shown, by its first and last tokens; null for all of it. */
export function zoomed() {
  const found = /^(\d{1,9})-(\d{1,9}),(\d{1,9})-(\d{1,9})$/.exec(view.zoom);
  if (!found) return null;
  const [, top, bottom, left, right] = found.map(Number);
  return top <= bottom && left <= right ? { rows: [top, bottom], columns: [left, right] } : null;
}

/** Make a view fit the run: an address may hold anything. */
function settle() {
  const at = scenario();
  view.scenario = at.name;
  if (view.other === at.name || !known.has(view.other)) view.other = "";
  if (!at.layers.includes(view.layer)) {
    view.layer = at.layers.reduce(
      (best, layer) => (Math.abs(layer - view.layer) < Math.abs(best - view.layer) ? layer : best),
      at.layers[0] ?? 0,
    );
  }
  view.head = clamp(view.head, -1, headsOf(at) - 1);
  view.token = clamp(view.token, 0, at.tokens.length - 1);
  view.window = windowOf(clamp(view.window, 0, at.tokens.length - 1), at.tokens.length);
  const saes = saesOf(at);
  if (!saes.includes(view.sae)) view.sae = saes[0] || "features";
  const features = at.arrays[view.sae] ? at.arrays[view.sae].shape[2] : 0;
  view.feature = clamp(view.feature, -1, features - 1);
  if (!placesOf(at).includes(view.place)) view.place = "";
  const part = zoomed();
  if (!part || Math.max(...part.rows, ...part.columns) >= at.tokens.length) view.zoom = "";
  if (!["row", "absolute"].includes(view.scale)) view.scale = "panel";
  if (!["light", "dark"].includes(view.theme)) view.theme = "";
}

/** Whether the page has an address: one that is given to a frame as text, as in a notebook, has none. */
const addressed = location.protocol !== "about:";

/** What a page in a notebook shows first, written like the address. */
const given = /** @type {HTMLMetaElement | null} */ (document.querySelector('meta[name="view"]'));

/** The last token of the prompt, which is shown first. @param {Scenario} of */
export function decisionOf(of) {
  return (of.generated ? of.generated.from : of.tokens.length) - 1;
}

/**
 * Whether a span is all that the model wrote, which is marked otherwise and would hide the spans in it.
 * @param {Scenario} of @param {string} span
 */
export function isAllGenerated(of, span) {
  return Boolean(of.generated) && span === "completion";
}

/** Take the view from the address. */
function read() {
  const found = asked();
  view.scenario = found.get("scenario") || "";
  const at = scenario();
  view.other = found.get("with") || "";
  const own = found.has("layer") || found.has("head") ? null : opening;
  view.layer = whole(found.get("layer"), own?.layer ?? at.layers[Math.floor(at.layers.length / 2)] ?? 0);
  view.head = whole(found.get("head"), own?.head ?? -1);
  view.place = found.get("place") || "";
  view.zoom = found.get("zoom") || "";
  view.scale = /** @type {View["scale"]} */ (found.get("scale") || "panel");
  view.token = whole(found.get("token"), decisionOf(at));
  view.window = whole(found.get("window"), view.token);
  view.feature = whole(found.get("feature"), -1);
  view.sae = found.get("sae") || "features";
  view.special = found.get("special") === "1";
  view.theme = found.get("theme") || "";
  const wanted = { ...view };
  settle();
  note(found, wanted);
}

/** Keep what an address asks for and the run lacks. @param {URLSearchParams} found @param {View} wanted */
function note(found, wanted) {
  const at = scenario(), tokens = at.tokens.length;
  const names = /** @type {Record<string, keyof View>} */ ({
    scenario: "scenario", with: "other", layer: "layer", head: "head", token: "token", feature: "feature",
    sae: "sae", place: "place", zoom: "zoom", scale: "scale", theme: "theme" });
  const has = /** @type {Record<string, string>} */ ({
    layer: `layers ${at.layers[0]} to ${at.layers[at.layers.length - 1]}`, head: `heads 0 to ${headsOf(at) - 1}`,
    token: `tokens 0 to ${tokens - 1}`, sae: saesOf(at).join(", ") || "no features",
    feature: at.arrays[view.sae] ? `features 0 to ${at.arrays[view.sae].shape[2] - 1}` : "no features" });
  unknown.length = 0;
  for (const [name, key] of Object.entries(names)) {
    const given_ = found.get(name);
    if (!given_ || (String(wanted[key]) === given_ && view[key] === wanted[key])) continue;
    unknown.push(`${name}=${given_.slice(0, 60)}${has[name] ? ` (${view.scenario} has ${has[name]})` : ""}`);
  }
}

/** @returns {string} */
function address() {
  const at = scenario();
  const out = new URLSearchParams({ scenario: view.scenario });
  if (view.other) out.set("with", view.other);
  out.set("layer", String(view.layer));
  if (view.head >= 0) out.set("head", String(view.head));
  out.set("token", String(view.token));
  if (windowOf(view.token, at.tokens.length) !== view.window) out.set("window", String(view.window));
  if (view.feature >= 0) out.set("feature", String(view.feature));
  if (view.sae !== "features") out.set("sae", view.sae);
  if (view.special) out.set("special", "1");
  if (view.place) out.set("place", view.place);
  if (view.zoom) out.set("zoom", view.zoom);
  if (view.scale !== "panel") out.set("scale", view.scale);
  if (view.theme) out.set("theme", view.theme);
  return `#${out}`;
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let later;

/** @param {View} before */
function tell(before) {
  const changed = new Set(
    Object.keys(view).filter((key) => /** @type {any} */ (before)[key] !== /** @type {any} */ (view)[key]),
  );
  if (changed.size) listeners.forEach((listener) => listener(changed));
}

/**
 * Choose something.
 * @param {Partial<View>} change
 */
export function choose(change) {
  const before = { ...view };
  Object.assign(view, change);
  settle();
  unknown.length = 0;
  // A new scenario is a step that "back" undoes; moving about within one is not.
  const step = before.scenario !== view.scenario || before.other !== view.other;
  clearTimeout(later);
  if (addressed && step) history.pushState(null, "", address());
  // Browsers refuse an address that changes all the time, as under a held arrow key.
  else if (addressed) later = setTimeout(() => history.replaceState(null, "", address()), 80);
  tell(before);
}

/** Which of the scenarios that were asked for is the last one. */
let asking = 0;

/**
 * Read what is asked for, then go there, unless something else has been asked for by then.
 * @param {string[]} scenarios @param {() => void} go
 */
async function reading(scenarios, go) {
  const mine = ++asking;
  busy();
  try {
    await Promise.all(scenarios.map(opened));
    if (mine === asking) go();
  } catch (error) {
    if (mine === asking) fail(/** @type {HTMLElement} */ (document.getElementById("top")), error);
  }
  done();
}

/**
 * Choose a scenario, or one to compare with, and other things with it.
 * @param {Partial<View>} change
 */
export function visit(change) {
  const wanted = [change.scenario, change.other].filter((name) => name !== undefined && names.has(name));
  return reading(/** @type {string[]} */ (wanted), () => {
    const at = scenario(change.scenario ?? view.scenario);
    // The decision is each scenario's; any other position is another word there.
    const token = change.token ?? (at.name === view.scenario ? undefined : decisionOf(at));
    choose(token === undefined ? change : { ...change, token, window: windowOf(token, at.tokens.length) });
  });
}

/** The scenarios that an address names. */
function inAddress() {
  const found = asked(), other = found.get("with") || "";
  return [found.get("scenario") || "", ...(names.has(other) ? [other] : [])];
}

/** Read the scenarios that the page opens with. */
export const readFirst = () => Promise.all(inAddress().map(opened));

/** @param {(changed: Set<string>) => void} listener */
export function onChange(listener) {
  listeners.push(listener);
}

/** Begin: from the address, and with it from now on. */
export function start() {
  read();
  const follow = () => {
    clearTimeout(later);
    reading(inAddress(), () => {
      const before = { ...view };
      read();
      tell(before);
    });
  };
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
}
