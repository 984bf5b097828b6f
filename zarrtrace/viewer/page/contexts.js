/** The strongest tokens of features over the run, from its index: files of the bundle, a block of features each. */

import { index } from "./state.js";
import { packed } from "./store.js";

/**
 * A token at which the feature is strong: scenario, position, activation, the text before it, its own,
 * that behind it, whether the model generated it (0 or 1), and at how many tokens this text stands.
 * @typedef {[string, number, number, string, string, string, number, number]} Context
 *
 * @typedef {Object} Uses of one feature; special tokens are no contexts
 * @property {number} active at how many tokens it fires
 * @property {number} mean over all tokens
 * @property {number[]} activations of its strongest tokens
 * @property {string[]} words
 * @property {Context[]} contexts the different texts around them
 *
 * @typedef {{tokens: number, features: Record<string, Uses>}} UsesOfBlock
 */

/** Blocks that were asked for. @type {Map<string, Promise<UsesOfBlock>>} */
const asked = new Map();
/** Blocks that are there. @type {Map<string, UsesOfBlock>} */
const known = new Map();
const KEPT = 64;

/** The path of the file that holds a feature; "" if the index lacks it. @param {string} sae @param {number} layer @param {number} feature */
function pathOf(sae, layer, feature) {
  const found = index.strongest;
  if (!found || found.problem || !found.layers.includes(layer) || !(feature < found.arrays[sae])) return "";
  return `data/@strongest/${sae}/${layer}/${Math.floor(feature / found.step)}.json.gz`;
}

/** @param {string} path @returns {Promise<UsesOfBlock>} */
async function read(path) {
  const found = await packed(path);
  known.set(path, found);
  return found;
}

/**
 * Read the block of a feature; afterwards wordsOf() knows all of it.
 * @param {string} sae @param {number} layer @param {number} feature
 * @returns {Promise<UsesOfBlock | null>} null if the index lacks this layer or array
 */
export async function readUses(sae, layer, feature) {
  const path = pathOf(sae, layer, feature);
  if (!path) return null;
  const found = asked.get(path) ?? read(path);
  asked.delete(path); // last used goes to the end
  asked.set(path, found);
  found.catch(() => asked.delete(path)); // it may be there the next time
  for (const old of asked.keys()) {
    if (asked.size <= KEPT) break;
    asked.delete(old);
    known.delete(old);
  }
  return found;
}

/**
 * Return the words of a feature's strongest tokens, in quotes; null if its block has not been read.
 * @param {string} sae @param {number} layer @param {number} feature
 * @returns {string | null}
 */
export function wordsOf(sae, layer, feature) {
  const block = known.get(pathOf(sae, layer, feature));
  if (!block) return null;
  return (block.features[feature]?.words ?? []).map((word) => `"${word}"`).join(", ");
}
