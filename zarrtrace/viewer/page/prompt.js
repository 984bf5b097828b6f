/** The prompt as tokens: what the active one attends to, what attends to it, what comes next. */

import { element, fail, number, spanColour, tokenText, visible } from "./draw.js";
import { choose, index, scenario, view } from "./state.js";
import { ofToken, WINDOW, windowOf } from "./store.js";

/** @typedef {import("./types.js").Block} Block */

const panel = /** @type {HTMLElement} */ (document.getElementById("prompt"));
const list = /** @type {HTMLElement} */ (document.getElementById("tokens"));
const legend = /** @type {HTMLElement} */ (document.getElementById("spans"));
const pager = /** @type {HTMLElement} */ (document.getElementById("windows"));

/** @type {HTMLElement[]} */
let tokens = [];
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
  tokens = [];
  list.replaceChildren();
  for (let position = first; position < last; position++) {
    const text = at.tokens[position];
    const token = element("span", {
      class: "token", role: "option", tabindex: position === view.token ? "0" : "-1",
      "data-position": String(position), "aria-selected": String(position === view.token),
      dir: "auto",
    });
    token.textContent = visible(text);
    const of = names.filter((name) => at.spans[name].includes(position));
    if (of.length) {
      token.style.setProperty("--span", spanColour(names.indexOf(of[0])));
      token.classList.add("in-span");
      token.title = of.join(", ");
    }
    tokens.push(token);
    list.append(token);
    if (/\n$/.test(text)) list.append(element("br"));
  }
  if (!tokens.some((token) => token.tabIndex === 0) && tokens.length) tokens[0].tabIndex = 0;
  legend.replaceChildren(
    ...names.map((name, i) => {
      const key = element("button", { type: "button", class: "span-key" }, name);
      key.style.setProperty("--span", spanColour(i));
      key.addEventListener("click", () => {
        const token = at.spans[name][at.spans[name].length - 1];
        if (token !== undefined) choose({ token, window: windowOf(token, at.tokens.length) });
      });
      return key;
    }),
  );
  buildPager(at.tokens.length);
}

/** @param {number} count */
function buildPager(count) {
  pager.hidden = count <= WINDOW;
  if (pager.hidden) return;
  const input = element("input", {
    type: "range", min: "0", max: String(Math.ceil(count / WINDOW) - 1),
    value: String(view.window / WINDOW), "aria-label": "window of tokens",
  });
  input.addEventListener("input", () => choose({ window: Number(input.value) * WINDOW }));
  const last = Math.min(count, view.window + WINDOW) - 1;
  pager.replaceChildren("tokens ", element("output", {}, `${view.window}–${last} of ${count}`), input);
}

/**
 * Take new attention: from the active token within the window, and to it.
 * @param {{rows: Block, columns: Block, at: number} | null} blocks
 *   rows: queries of the window; columns: queries of the window, keys of the chosen token's
 */
export function show(blocks) {
  shown = blocks;
  tokens.forEach((token) => {
    const chosen = Number(token.dataset.position) === view.token;
    token.setAttribute("aria-selected", String(chosen));
    token.tabIndex = chosen ? 0 : -1;
  });
  if (!tokens.some((token) => token.tabIndex === 0) && tokens.length) tokens[0].tabIndex = 0;
  paint();
}

/** @param {Block} of @param {number} at @param {number} query @param {number} key */
function weight(of, at, query, key) {
  const row = query - of.firstRow, column = key - of.firstColumn;
  if (row < 0 || column < 0 || row >= of.rows || column >= of.columns) return NaN;
  return of.data[(at * of.rows + row) * of.columns + column];
}

/** Colour every token by its attention from and to the active one. */
function paint() {
  const at = activeToken();
  /** @type {[number, number][]} */
  const to = [];
  /** @type {[number, number][]} */
  const from = [];
  tokens.forEach((token) => {
    const position = Number(token.dataset.position);
    let colour = "";
    if (shown) {
      const out = shownWeight(at, position);
      if (position <= at && out > 0) {
        colour = `rgb(var(--to) / calc(var(--most) * ${Math.sqrt(out).toFixed(3)}))`;
        to.push([position, out]);
      }
      const back = shownWeight(position, at);
      if (position >= at && back > 0) {
        if (position > at) colour = `rgb(var(--from) / calc(var(--most) * ${Math.sqrt(back).toFixed(3)}))`;
        from.push([position, back]);
      }
    }
    token.style.backgroundColor = colour;
    token.classList.toggle("active", position === at);
  });
  readout("attends-to", to);
  readout("attended-by", from);
  const name = /** @type {HTMLElement} */ (document.getElementById("active-token"));
  const text = scenario().tokens[at];
  name.replaceChildren(`${at} `, tokenText(text));
}

/** @param {number} query @param {number} key */
function shownWeight(query, key) {
  if (!shown) return NaN;
  const found = weight(shown.rows, shown.at, query, key);
  return Number.isNaN(found) ? weight(shown.columns, shown.at, query, key) : found;
}

/** @param {string} id @param {[number, number][]} weights */
function readout(id, weights) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  weights.sort((x, y) => y[1] - x[1]);
  const texts = scenario().tokens;
  out.replaceChildren(
    ...weights.slice(0, 6).map(([position, value]) => {
      const row = element("li", { "data-position": String(position) },
        element("span", { class: "position" }, String(position)), tokenText(texts[position]), number(value));
      row.style.setProperty("--share", `${(100 * Math.min(1, value)).toFixed(1)}%`);
      return row;
    }),
  );
  if (!weights.length) out.append(element("li", { class: "none" }, shown ? "nothing in this window" : "no attention stored"));
}

/** What the model says next after the active token. @param {number} token */
export async function showNext(token) {
  const at = scenario();
  const out = /** @type {HTMLElement} */ (document.getElementById("next"));
  const box = /** @type {HTMLElement} */ (document.getElementById("next-token"));
  const ids = at.arrays.next_token, logs = at.arrays.next_token_logprob;
  if (!ids || !logs) {
    fail(box, "This run holds no next-token probabilities.");
    return;
  }
  try {
    const [id, log] = await Promise.all([ofToken(ids, token), ofToken(logs, token)]);
    if (token !== activeToken() || at !== scenario()) return;
    fail(box, null);
    const options = new Map(Object.entries(at.options).map(([name, number]) => [number, name]));
    out.replaceChildren(
      ...Array.from(id, (number_, i) => {
        const p = Math.exp(log[i]);
        const known = index.vocabulary[String(number_)];
        const label = known === undefined
          ? element("span", { class: "unknown", title: "token id; its text is in no prompt of this run" }, `#${number_}`)
          : tokenText(known);
        const row = element("li", { "data-token-id": String(number_) }, label,
          element("span", { class: "option" }, options.get(number_) || ""), number(p));
        row.style.setProperty("--share", `${(100 * p).toFixed(1)}%`);
        return row;
      }),
    );
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
