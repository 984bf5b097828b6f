/** The prompt as tokens: what the active one attends to, what attends to it, what comes next. */

import { bars, element, fail, named, number, setNumber, spanColour, theme, tokenText, visible } from "./draw.js";
import { choose, index, isAllGenerated, scenario, view } from "./state.js";
import { ofToken, WINDOW, windowOf } from "./store.js";

/** @typedef {import("./types.js").Block} Block */
/** @typedef {import("./types.js").Scenario} Scenario */

const panel = /** @type {HTMLElement} */ (document.getElementById("prompt"));
const list = /** @type {HTMLElement} */ (document.getElementById("tokens"));
const legend = /** @type {HTMLElement} */ (document.getElementById("spans"));
const pager = /** @type {HTMLElement} */ (document.getElementById("windows"));

/** @type {HTMLElement[]} */
let tokens = [];
/** Their background colours. @type {string[]} */
let colours = [];
/** Which of them is said to be the chosen one; none if it is in another window. */
let marked = -1;
/** Which of them is outlined. */
let outlined = NaN;
let hovered = -1;
/** @type {{rows: Block, columns: Block, at: number} | null} */
let shown = null;
/** @type {(token: number) => void} */
let afterHover = () => {};

/** The token under the pointer or the focus, else the chosen one. */
export function activeToken() {
  return hovered >= 0 ? hovered : view.token;
}

/** @param {(token: number) => void} listener called with the active token */
export function onActive(listener) {
  afterHover = listener;
}

/** Activations that colour the prompt in place of attention. @type {{feature: number, values: Float32Array} | null} */
let painted = null;

/**
 * Colour the tokens of the window by a feature; by attention again if null.
 * @param {{feature: number, values: Float32Array} | null} by
 */
export function colourBy(by) {
  if (!by && !painted) return;
  painted = by;
  const most = by ? largest(by.values) : 0;
  for (const [id, hidden] of /** @type {[string, boolean][]} */ ([["attention-legend", Boolean(by)], ["feature-legend", !by]])) {
    /** @type {HTMLElement} */ (document.getElementById(id)).hidden = hidden;
  }
  if (by) {
    document.getElementById("painted-feature")?.replaceChildren(`feature ${by.feature}`);
    document.getElementById("painted-most")?.replaceChildren(number(most));
  }
  paint();
}

/** @param {Float32Array} values */
const largest = (values) => values.reduce((most, v) => (Math.abs(v) > most ? Math.abs(v) : most), 0);

/** @param {number} token */
function hover(token) {
  if (token === hovered) return;
  hovered = token;
  paint();
  afterHover(activeToken());
}

/** Build the tokens of the window. */
export function build() {
  const at = scenario();
  const first = view.window, last = Math.min(at.tokens.length, first + WINDOW);
  const names = Object.keys(at.spans);
  hovered = -1;
  outlined = NaN; // no token yet
  tokens = [];
  colours = [];
  list.replaceChildren();
  for (let position = first; position < last; position++) {
    const text = at.tokens[position];
    const token = element("span", {
      class: "token", role: "option", tabindex: position === view.token ? "0" : "-1",
      "data-position": String(position), "aria-selected": String(position === view.token),
      dir: "auto",
    });
    if (/^\s*$/.test(text)) token.setAttribute("aria-label", visible(text));
    token.textContent = visible(text);
    const of = names.filter((name) => at.spans[name].includes(position));
    const own = of.find((name) => !isAllGenerated(at, name));
    if (own) {
      token.style.setProperty("--span", spanColour(names.indexOf(own)));
      token.classList.add("in-span");
    }
    if (of.length) {
      token.title = of.join(", ");
      token.setAttribute("aria-description", of.join(", "));
    }
    tokens.push(token);
    list.append(token);
    if (at.generated && position >= at.generated.from) {
      token.classList.add("generated");
      token.setAttribute("aria-description", [...of, "generated"].join(", "));
      if (position === at.generated.from) list.insertBefore(element("span", { class: "prompt-end", "aria-hidden": "true" }), token);
    }
    if (/\n$/.test(text)) list.append(element("br"));
  }
  marked = view.token - first;
  if (!tokens[marked] && tokens.length) tokens[0].tabIndex = 0;
  buildLegend(at, names);
  buildGenerated(at);
  buildMetadata(at);
  buildPager(at.tokens.length);
}

/** @param {Scenario} at @param {string[]} names of its spans */
function buildLegend(at, names) {
  const key = JSON.stringify([at.name, theme()]);
  if (legend.dataset.shown === key) return; // a button that has the focus keeps it
  legend.dataset.shown = key;
  legend.replaceChildren(...names.map((name, i) => {
    const one = element("button", { type: "button", class: "span-key" }, name);
    one.style.setProperty("--span", spanColour(i));
    one.addEventListener("click", () => {
      const token = at.spans[name][at.spans[name].length - 1];
      if (token !== undefined) choose({ token, window: windowOf(token, at.tokens.length) });
    });
    return one;
  }));
}

/** Say what the model wrote behind the prompt, and what it chose. @param {Scenario} at */
function buildGenerated(at) {
  const out = /** @type {HTMLElement} */ (document.getElementById("generated"));
  out.hidden = !at.generated;
  if (!at.generated) return;
  const { from, text, choice, ended_by } = at.generated;
  const ends = /** @type {Record<string, string>} */ ({
    length: "its length", stop: "a stop text", end_of_sequence: "the end of the sequence" });
  out.replaceChildren(element("span", { class: "prompt-end", "aria-hidden": "true" }),
    `generated from token ${from} on: `, element("bdi", { class: "token generated" }, visible(text)),
    " · choice: ", element("strong", {}, choice ?? "none"), ` · ended by ${ends[ended_by] ?? ended_by}`);
}

/** The columns of metadata that the scenario has. @param {Scenario} at */
function buildMetadata(at) {
  const columns = Object.entries(at.metadata).filter(([, value]) => value !== null);
  const out = /** @type {HTMLElement} */ (document.getElementById("metadata"));
  out.hidden = !columns.length;
  out.querySelector("tbody")?.replaceChildren(...columns.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name),
      element("td", {}, element("bdi", {}, String(value))))));
}

const pages = element("input", { type: "range", min: "0", "aria-label": "window of tokens" });
const range = element("output");
pages.addEventListener("input", () => choose({ window: Number(pages.value) * WINDOW }));
pager.append("tokens ", range, pages);

/** @param {number} count */
function buildPager(count) {
  pager.hidden = count <= WINDOW;
  pages.max = String(Math.ceil(count / WINDOW) - 1);
  pages.value = String(view.window / WINDOW);
  range.textContent = `${view.window}–${Math.min(count, view.window + WINDOW) - 1} of ${count}`;
  pages.setAttribute("aria-valuetext", range.textContent);
}

/**
 * Take new attention: from the active token within the window, and to it.
 * @param {{rows: Block, columns: Block, at: number} | null} blocks
 *   rows: queries of the window; columns: queries of the window, keys of the chosen token's
 */
export function show(blocks) {
  shown = blocks;
  const chosen = view.token - view.window;
  if (chosen !== marked) {
    tokens[marked]?.setAttribute("aria-selected", "false");
    tokens[chosen]?.setAttribute("aria-selected", "true");
    // One of them can be tabbed to, also where the chosen one is in another window.
    for (const token of tokens.filter((one) => one.tabIndex === 0)) token.tabIndex = -1;
    (tokens[chosen] ?? tokens[0])?.setAttribute("tabindex", "0");
    marked = chosen;
  }
  paint();
}

/** @param {Block} of @param {number} at @param {number} query @param {number} key */
function weight(of, at, query, key) {
  const row = query - of.firstRow, column = key - of.firstColumn;
  if (row < 0 || column < 0 || row >= of.rows || column >= of.columns) return NaN;
  return of.data[(at * of.rows + row) * of.columns + column];
}

/** Colours of a theme by attention, from none to all, so that hovering parses nothing. @type {Record<string, string[]>} */
const shades = {};

/** @param {"to" | "from" | "feature"} way @param {number} weight */
function shade(way, weight) {
  const found = (shades[`${theme()} ${way}`] ??= (() => {
    const style = getComputedStyle(document.documentElement);
    const [colour, most] = [style.getPropertyValue(`--${way}`), Number(style.getPropertyValue("--most"))];
    return Array.from({ length: 65 }, (_, i) => `rgb(${colour} / ${((most * i) / 64).toFixed(3)})`);
  })());
  return found[Math.round(64 * Math.sqrt(Math.min(1, weight)))];
}

/** Colour every token by its attention from and to the active one. */
function paint() {
  const at = activeToken();
  /** @type {[number, number][]} */
  const to = [];
  /** @type {[number, number][]} */
  const from = [];
  const most = painted ? largest(painted.values) : 0;
  tokens.forEach((token, i) => {
    const position = view.window + i;
    let colour = "";
    if (shown) {
      const out = position <= at ? shownWeight(at, position) : 0;
      if (out > 0) {
        colour = shade("to", out);
        to.push([position, out]);
      }
      const back = position >= at ? shownWeight(position, at) : 0;
      if (back > 0) {
        if (position > at) colour = shade("from", back);
        from.push([position, back]);
      }
    }
    if (painted) {
      const share = most > 0 ? Math.abs(painted.values[i]) / most : 0;
      colour = share > 0 ? shade("feature", share) : "";
    }
    if (colours[i] !== colour) token.style.backgroundColor = colours[i] = colour;
  });
  if (outlined !== at - view.window) {
    tokens[outlined]?.classList.remove("active");
    outlined = at - view.window;
    tokens[outlined]?.classList.add("active");
    for (const id of ["active-token", "features-of"]) {
      document.getElementById(id)?.replaceChildren(...named(scenario(), at));
    }
  }
  const inside = at >= view.window && at < view.window + tokens.length;
  readout("attends-to", to, inside && Number.isNaN(shownWeight(at, at)));
  const first = Math.max(at, view.window), later = tokens.length - (first - view.window);
  const unstored = Array.from({ length: Math.max(0, later) }, (_, i) => Number.isNaN(shownWeight(first + i, at)));
  readout("attended-by", from, unstored.length > 0 && unstored.every(Boolean));
}

/** @param {number} query @param {number} key */
function shownWeight(query, key) {
  if (!shown) return NaN;
  const found = weight(shown.rows, shown.at, query, key);
  return Number.isNaN(found) ? weight(shown.columns, shown.at, query, key) : found;
}

/**
 * @param {string} id @param {[number, number][]} weights
 * @param {boolean} unstored whether the run holds none of these rows (`--positions`)
 */
function readout(id, weights, unstored) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  weights.sort((x, y) => y[1] - x[1]);
  const texts = scenario().tokens;
  const make = () => element("li", {}, element("span", { class: "position" }), tokenText(""), number(0));
  bars(out, weights.slice(0, 10), make, (row, [position, value]) => {
    const [place, text, shown] = row.children;
    row.dataset.position = place.textContent = String(position);
    text.textContent = visible(texts[position]);
    setNumber(/** @type {HTMLDataElement} */ (shown), value);
    return value;
  });
  if (weights.length) return;
  const why = !shown ? "no attention stored" : unstored ? "not stored for these tokens" : "nothing in this window";
  out.replaceChildren(element("li", { class: "none" }, why));
}

/**
 * The likeliest continuations after a token: probabilities by token id, likeliest first.
 * @param {Scenario} of @param {number} token
 * @returns {Promise<Map<number, number> | null>} null if the run holds none
 */
export async function continuations(of, token) {
  const ids = of.arrays.next_token, logs = of.arrays.next_token_logprob;
  if (!ids || !logs) return null;
  const [id, log] = await Promise.all([ofToken(ids, token), ofToken(logs, token)]);
  if (log.every(Number.isNaN)) return null; // a trace that is still being extracted
  return new Map(Array.from(id, (number_, i) => [number_, Math.exp(log[i])]));
}

/** A token id as text, with the option it stands for. @param {Scenario} of @param {number} id */
export function nameOfToken(of, id) {
  const option = Object.keys(of.options).find((name) => of.options[name] === id) || "";
  return [tokenText(index.vocabulary[String(id)]), element("span", { class: "option" }, option)];
}

/** What the model says next after the active token. @param {number} token */
export async function showNext(token) {
  const at = scenario();
  const out = /** @type {HTMLElement} */ (document.getElementById("next"));
  const box = /** @type {HTMLElement} */ (document.getElementById("next-token"));
  try {
    const found = await continuations(at, token);
    if (token !== activeToken() || at !== scenario()) return;
    if (!found) throw new Error("This run holds no next-token probabilities.");
    fail(box, null);
    const make = () => element("li", {}, element("span", { class: "of-token" }), number(0));
    bars(out, Array.from(found), make, (row, [id, p]) => {
      const [name, shown] = row.children;
      row.dataset.tokenId = String(id);
      name.replaceChildren(...nameOfToken(at, id));
      setNumber(/** @type {HTMLDataElement} */ (shown), p);
      return p;
    });
  } catch (error) {
    fail(box, error);
  }
}

/** @param {EventTarget | null} target */
function positionOf(target) {
  const token = target instanceof Element ? target.closest(".token") : null;
  return token instanceof HTMLElement ? Number(token.dataset.position) : -1;
}

list.addEventListener("pointerover", (event) => hover(positionOf(event.target)));
list.addEventListener("pointerleave", () => hover(-1));
list.addEventListener("focusin", (event) => hover(positionOf(event.target)));
list.addEventListener("focusout", () => hover(-1));
list.addEventListener("click", (event) => {
  const token = positionOf(event.target);
  if (token >= 0) choose({ token });
});
list.addEventListener("keydown", (event) => {
  const token = positionOf(event.target);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const at = scenario();
  let next = token;
  if (step) next = token + step;
  else if (event.key === "Home") next = view.window;
  else if (event.key === "End") next = Math.min(at.tokens.length, view.window + WINDOW) - 1;
  else if (event.key === "Enter" || event.key === " ") choose({ token });
  else return;
  event.preventDefault();
  event.stopPropagation();
  if (next < 0 || next >= at.tokens.length) return;
  if (windowOf(next, at.tokens.length) !== view.window) choose({ window: windowOf(next, at.tokens.length) });
  tokens[next - view.window]?.focus();
});

/** @param {unknown} error */
export const failPrompt = (error) => fail(panel, error);
