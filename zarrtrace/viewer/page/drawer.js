/** Of the feature in the drawer, from the run's index: how strong it gets, and in which contexts. */

import { readUses } from "./contexts.js";
import { element, histogram, number, spaced } from "./draw.js";
import { index, isHere, view, visit } from "./state.js";

/** @typedef {import("./contexts.js").Context} Context */
/** @typedef {import("./contexts.js").Uses} Uses */

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));

/** @param {number} count */
const counted = (count) => count.toLocaleString("en");

/** Show the strongest tokens of the chosen feature on the chosen layer. */
export async function showUses() {
  const { sae, layer, feature } = view;
  const out = $("contexts"), known = index.strongest;
  const isChosen = () => sae === view.sae && layer === view.layer && feature === view.feature;
  const say = (/** @type {string} */ text) => {
    $("uses-of").textContent = text;
    $("histogram").hidden = true;
    out.replaceChildren();
  };
  if (!known) return say("The run has no index; ‘zarrtrace index’ makes one, which lists a feature’s strongest tokens.");
  if (known.problem) return say(known.problem);
  try {
    const block = await readUses(sae, layer, feature);
    if (!isChosen()) return;
    const found = block?.features[feature];
    if (!block) return say("The index lacks this layer.");
    if (!found || !found.activations.length) return say(`It fires at ${found ? "special tokens only" : `none of ${counted(block.tokens)} tokens`}.`);
    $("uses-of").replaceChildren(...inWords(found, block.tokens));
    const canvas = /** @type {HTMLCanvasElement} */ ($("histogram"));
    canvas.hidden = false;
    canvas.setAttribute("aria-label", `histogram of ${found.activations.length} activations`);
    histogram(canvas, found.activations);
    out.replaceChildren(...found.contexts.map(row));
  } catch (error) {
    if (isChosen()) say(String(error instanceof Error ? error.message : error));
  }
}

/** Say which tokens the histogram counts, of how many. @param {Uses} found @param {number} tokens */
function inWords(found, tokens) {
  const { special, indexed, scenarios } = /** @type {NonNullable<typeof index.strongest>} */ (index.strongest);
  const shown = found.activations.length;
  const which = shown === found.active ? `All ${counted(shown)}` : `The ${shown} strongest of ${counted(found.active)}`;
  const left = special ? "; special tokens count in these numbers, and are not drawn or listed" : "";
  const part = indexed < scenarios ? `; ${counted(indexed)} of ${counted(scenarios)} scenarios are indexed` : "";
  return [`${which} tokens at which it fires, of ${counted(tokens)}; mean over all `, number(found.mean), `${left}${part}.`];
}

/** A context; choosing it goes there, if this page has its scenario. @param {Context} context */
function row([scenario, position, activation, before, token, after, generated, times]) {
  const text = element("bdi", { class: "context" }, spaced(before), element("mark", {}, spaced(token)), spaced(after));
  const where = `${scenario}, token ${position}${generated ? ", generated" : ""}`;
  const out = element("li", { "data-position": String(position), "data-scenario": scenario }, text,
    element("span", { class: "position" }, times > 1 ? `×${times}` : ""), number(activation));
  if (!isHere(scenario)) {
    out.title = `${where}: not on this page`;
    return out;
  }
  out.className = "pickable";
  out.title = where;
  const go = element("button", { type: "button", class: "feature place" }, scenario);
  out.prepend(go);
  out.addEventListener("click", () => visit({ scenario, token: position }));
  return out;
}
