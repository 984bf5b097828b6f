/** Puts the panels together: what changes, what is drawn again. */

import { chosenBlock, fitGrids, headsBlock, meansBlock, showChosen, showHeads, showLarge, showLayers } from "./attention.js";
import { showCompare } from "./compare.js";
import { slices } from "./code.js";
import { boxOf, copyPicture, element, fail, forgetBoxes, setText, visible } from "./draw.js";
import { showFeature, showTop } from "./features.js";
import { clearOverview, showOverview } from "./overview.js";
import { activeToken, build, failPrompt, onActive, show, showNext } from "./prompt.js";
import { finding, showMap } from "./maps.js";
import { showResidual } from "./residual.js";
import { chooser } from "./scenarios.js";
import { startSearch } from "./search.js";
import { asked, busy, choose, decisionOf, done, headsOf, index, onChange, readFirst, scenario, setIndex, setOpening, start, unknown, view, visit } from "./state.js";
import { kernel, openIndex, windowOf } from "./store.js";

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const input = (/** @type {string} */ id) => /** @type {HTMLInputElement} */ ($(id));
const select = (/** @type {string} */ id) => /** @type {HTMLSelectElement} */ ($(id));

const ALL = ["scenario", "other", "layer", "head", "token", "window", "feature", "sae", "special", "place", "zoom", "scale", "theme"];
let pending = 0;
/** Whether the grids of small pictures have to be fitted to the page again. */
let loose = false;

/** Attention for the prompt's colours. */
async function showPrompt() {
  const at = scenario();
  const wanted = () => JSON.stringify([view.scenario, view.layer, view.head, view.token, view.window]);
  const key = wanted();
  try {
    const row = windowOf(view.token, at.tokens.length);
    const [rows, across, down] = await Promise.all([
      chosenBlock(at, view.window, view.window),
      row === view.window ? null : chosenBlock(at, row, view.window),
      row === view.window ? null : chosenBlock(at, view.window, row),
    ]);
    if (key !== wanted()) return;
    failPrompt(null);
    // The chosen token is in another window: either it looks back here, or this window looks at it.
    const other = row > view.window ? across : down;
    show(rows && { rows: rows.of, columns: (other || rows).of, at: rows.at });
  } catch (error) {
    if (key !== wanted()) return;
    show(null);
    failPrompt(error);
  }
}

/** Read neighbours of the chosen layer, so that the next step is there at once. */
function readAhead() {
  const at = scenario(), place = at.layers.indexOf(view.layer);
  const row = windowOf(view.token, at.tokens.length);
  for (const layer of [at.layers[place + 1], at.layers[place - 1]]) {
    if (layer !== undefined && at === scenario()) headsBlock(at, layer, row, view.window).catch(() => {});
  }
}

/** @type {number | undefined} */
let soon;

/** @typedef {import("./types.js").View} View */

/** @param {Set<string>} changed */
async function render(changed) {
  const some = (/** @type {string[]} */ ...names) => names.some((name) => changed.has(name));
  clearTimeout(soon); // what is read ahead must not delay what is asked for
  pending++;
  busy();
  if (some("theme")) applyTheme();
  // All of them before the first is drawn: after that, each would lay the page out again.
  for (const one of document.querySelectorAll(".ruler.across, .lines")) boxOf(/** @type {HTMLElement} */ (one));
  controls(changed);
  clearOverview();
  if (some("scenario", "window", "theme")) build();
  const work = [];
  if (some("scenario", "layer", "head", "token", "window", "zoom", "scale", "theme")) work.push(showLarge());
  if (some("scenario", "layer", "head", "token", "window", "theme")) work.push(showPrompt());
  if (some("scenario", "layer", "head", "token", "place", "scale", "theme")) work.push(showMap());
  if (some("scenario", "layer", "window", "scale", "theme") || (some("token") && scenario().tokens.length > 256)) work.push(showHeads());
  if (some("scenario", "token", "window", "scale", "theme", "layer")) work.push(showLayers());
  if (some("head")) showChosen();
  if (some("scenario", "token", "layer", "theme")) work.push(showResidual());
  if (some("scenario", "token")) work.push(showNext(activeToken()));
  if (some("scenario", "token", "layer", "sae", "feature", "special")) work.push(showTop(activeToken()));
  if (some("scenario", "layer", "window", "feature", "sae", "special", "theme")) work.push(showFeature());
  if (view.other ? some("scenario", "other", "layer", "head", "token", "window", "scale", "theme") : some("other", "theme")) work.push(showCompare());
  await Promise.all(work);
  loose ||= some("scenario", "theme");
  const isLast = !--pending;
  if (isLast && loose) fitGrids();
  if (isLast) loose = false;
  done();
  if (!isLast) return;
  // For who does not see what has changed.
  const [layer, head, token] = said();
  $("status").textContent = `${layer}, ${head}, ${token}`;
  soon = setTimeout(() => {
    readAhead();
    soon = setTimeout(showOverview, 240);
  }, 60);
}

/** What is chosen, in words: layer, head and token. */
function said() {
  const at = scenario();
  return [`L${view.layer}`, view.head < 0 ? "mean of heads" : `head ${view.head}`,
    `token ${view.token} ${visible(at.tokens[view.token]).slice(0, 40)}`];
}

/** Set the controls to what is chosen. @param {Set<string>} changed */
function controls(changed) {
  const at = scenario();
  if (changed.has("scenario")) {
    $("tags").textContent = at.tags.join(", ");
    input("layer").max = String(at.layers.length - 1);
    input("head").max = String(headsOf(at) - 1);
    input("head").disabled = !headsOf(at);
  }
  const missing = at.missing.length ? `Not stored: layers ${at.missing.join(", ")}.` : "";
  const lacking = unknown.length ? `This run has no ${unknown.join(", ")}; the nearest is shown.` : "";
  fail($("top"), [lacking, missing].filter(Boolean).join(" "));
  select("scale").value = view.scale;
  // A name that is being typed stays.
  for (const [id, name] of [["scenario", view.scenario], ["other", view.other]]) {
    if ($(id).getAttribute("aria-expanded") !== "true") input(id).value = name;
  }
  input("layer").value = String(at.layers.indexOf(view.layer));
  setText($("layer-shown"), `L${view.layer}`);
  input("layer").setAttribute("aria-valuetext", `layer ${view.layer}`);
  input("head").value = String(view.head);
  setText($("head-shown"), view.head < 0 ? "mean" : `H${view.head}`);
  const [layer, head] = said();
  input("head").setAttribute("aria-valuetext", head);
  for (const name of document.querySelectorAll(".layer-name")) setText(name, layer);
  for (const name of document.querySelectorAll(".matrix-name, #readout-of")) setText(name, `${layer}, ${head}`);
}

function applyTheme() {
  const dark = view.theme ? view.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  forgetBoxes();
  $("theme").textContent = dark ? "Light" : "Dark";
}

/** @param {KeyboardEvent} event */
function keys(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  const isTaken = target.checkVisibility() && target.closest("input, select, textarea, dialog, [role=option]");
  if (event.ctrlKey || event.metaKey || event.altKey || isTaken) return;
  const at = scenario(), layer = at.layers.indexOf(view.layer);
  const go = /** @type {Record<string, () => void>} */ ({
    ArrowUp: () => choose({ layer: at.layers[Math.max(0, layer - 1)] }),
    ArrowDown: () => choose({ layer: at.layers[Math.min(at.layers.length - 1, layer + 1)] }),
    ArrowLeft: () => choose({ head: view.head - 1 }),
    ArrowRight: () => choose({ head: view.head + 1 }),
  })[event.key];
  if (!go) return;
  event.preventDefault();
  go();
}

/** A button that copies what reads a panel's values in Python. @param {HTMLElement} panel */
function python(panel) {
  const code = slices[panel.id];
  if (!code) return [];
  const button = element("button", { type: "button", class: "copy", title: "Copy the lines that read this in Python" }, "Copy as Python");
  button.addEventListener("click", async () => {
    const text = code();
    button.dataset.code = text;
    const done = await navigator.clipboard.writeText(text).then(() => "copied", () => "");
    button.textContent = $("status").textContent = done || "not allowed here";
    if (!done) fail($("top"), text);
    setTimeout(() => { button.textContent = "Copy as Python"; }, 1500);
  });
  return [button];
}

function wire() {
  chooser("scenario", (name) => visit({ scenario: name }));
  chooser("other", (name) => visit({ other: name }), "nothing");
  startSearch();
  select("scale").addEventListener("change", () =>
    choose({ scale: /** @type {import("./types.js").View["scale"]} */ (select("scale").value) }));
  input("layer").addEventListener("input", () => choose({ layer: scenario().layers[Number(input("layer").value)] }));
  input("head").addEventListener("input", () => choose({ head: Number(input("head").value) }));
  $("theme").addEventListener("click", () =>
    choose({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }));
  document.addEventListener("keydown", keys);
  for (const panel of document.querySelectorAll("[data-picture]")) {
    panel.querySelector("h2")?.after(...[python(/** @type {HTMLElement} */ (panel))].flat());
    const button = element("button", { type: "button", class: "copy", title: "Copy this picture, or save it" }, "Copy PNG");
    button.addEventListener("click", async () => {
      const pair = view.other && panel.id === "compare-panel" ? [view.other] : [];
      const caption = [index.title, view.scenario, ...pair, ...said()].join(" · ");
      const done = await copyPicture(/** @type {HTMLElement} */ (panel), caption).catch(() => "too large");
      button.textContent = $("status").textContent = done;
      setTimeout(() => { button.textContent = "Copy PNG"; }, 1500);
    });
    panel.querySelector("h2")?.after(button);
  }
  onActive((token) => {
    showNext(token);
    showTop(token);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => render(new Set(["theme"])));
  // The drawer begins below the header, which stays at the top of the window.
  new ResizeObserver(() => $("feature-panel").style.setProperty("--top", `${$("top").offsetHeight}px`)).observe($("top"));
  // Its width changes with the window, and with the drawer.
  let { clientWidth } = $("panels");
  new ResizeObserver(() => {
    if (clientWidth === $("panels").clientWidth) return;
    ({ clientWidth } = $("panels"));
    forgetBoxes();
    loose = true;
    render(new Set(["layer"]));
  }).observe($("panels"));
}

/** The token that the address names, if the prompt has it. @param {import("./types.js").Scenario} of */
function tokenAsked(of) {
  const token = Number(asked().get("token") ?? NaN);
  return token >= 0 && token < of.tokens.length ? Math.floor(token) : decisionOf(of);
}

/**
 * Without a layer or a head in the address, the page opens where attention to a span is strongest.
 * @param {import("./types.js").Scenario} at @param {number} token
 */
async function openOnFinding(at, token) {
  const found = asked();
  if (found.has("layer") || found.has("head")) return;
  setOpening(await finding(at, token, found.get("place") || "").catch(() => null));
}

/** What Python and the page both set. @type {("scenario" | "layer" | "head" | "token" | "feature")[]} */
const SHARED = ["scenario", "layer", "head", "token", "feature"];

/** Show what Python sets, and tell it what is chosen here. @param {MessagePort} port */
function follow(port) {
  /** What Python is setting: it is not told that again, or it would undo what it sets next. @type {Partial<View>} */
  let wanted = {};
  const tell = (/** @type {Set<string>} */ changed) => {
    const news = SHARED.filter((name) => changed.has(name) && wanted[name] !== view[name]);
    if (news.length) port.postMessage({ view: Object.fromEntries(news.map((name) => [name, view[name]])) });
  };
  const take = async (/** @type {Partial<View>} */ found) => {
    wanted = found;
    await visit(found);
    wanted = {};
  };
  let isFirst = true, taken = Promise.resolve();
  port.addEventListener("message", ({ data }) => {
    if (!data.choose) return;
    if (isFirst) onChange(tell);
    const first = isFirst;
    isFirst = false;
    // One after another: what comes behind a scenario is meant for that.
    taken = taken.then(() => take(data.choose)).then(() => {
      // Until Python has chosen anything, it is told what the page opened on.
      if (first) tell(new Set(SHARED));
    });
  });
  port.postMessage({ isReady: true });
}

async function begin() {
  try {
    setIndex(await openIndex());
    await readFirst();
  } catch (error) {
    fail($("top"), error);
    document.body.dataset.state = "failed";
    return;
  }
  document.title = `${index.title} – zarrtrace`;
  $("run").textContent = index.model ? `${index.title} · ${index.model}` : index.title;
  // Attention comes later than the rest: all that is sure to be shown is asked for before it is known where to look.
  const at = scenario(asked().get("scenario") || ""), token = tokenAsked(at), row = windowOf(token, at.tokens.length);
  meansBlock(at, row, row).catch(() => {});
  await openOnFinding(at, token);
  start();
  wire();
  onChange(render);
  kernel?.then(follow);
  await render(new Set(ALL));
}

begin();
