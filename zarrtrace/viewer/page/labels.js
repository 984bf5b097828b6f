/** Labels of features: a file of the bundle for each array and layer, read when first asked for. */

/** Texts by feature. @typedef {Record<string, string>} Labels */

/** @type {Map<string, Labels>} */
const known = new Map();

/**
 * Read the labels of one layer; afterwards labelOf() knows them.
 * @param {Record<string, number[]>} labelled layers by array: `labels` of index.json
 * @param {string} sae array of features: "features", "features_NAME"
 * @param {number} layer
 * @param {(path: string) => Promise<Response>} file returns a file of the bundle
 */
export async function readLabels(labelled, sae, layer, file) {
  const key = `${sae}/${layer}`;
  if (known.has(key) || !labelled[sae]?.includes(layer)) return;
  const response = await file(`data/@labels/${key}.json.gz`);
  const body = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body);
  const unpacked = body.pipeThrough(new DecompressionStream("gzip"));
  known.set(key, await new Response(unpacked).json());
}

/** Labels of a layer by feature; undefined if they have not been read. @param {string} sae @param {number} layer */
export const labelsOf = (sae, layer) => known.get(`${sae}/${layer}`);

/**
 * Return the label of a feature; null if it has none, or its layer has not been read.
 * @param {string} sae
 * @param {number} layer
 * @param {number} feature
 * @returns {string | null}
 */
export function labelOf(sae, layer, feature) {
  const labels = known.get(`${sae}/${layer}`);
  return labels && Object.hasOwn(labels, String(feature)) ? labels[feature] : null;
}
