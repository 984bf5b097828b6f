/** Reading a bundle: index.json, and chunks of arrays that the browser itself unpacks. */

/** @typedef {import("./types.js").ArrayInfo} ArrayInfo */
/** @typedef {import("./types.js").Index} Index */
/** @typedef {import("./types.js").Scenario} Scenario */
/** @typedef {import("./types.js").Block} Block */
/** @typedef {Float32Array | Uint32Array} Values */

const VERSION = 2;
/** Longer prompts are shown in windows of so many tokens. */
export const WINDOW = 256;
const CACHE_BYTES = 192 * 2 ** 20;

/** A part of the run that cannot be read; the message is for people. */
export class DamagedError extends Error {}

/** @type {Record<string, string> | null} */
let inline = null;
/** @type {Map<string, Promise<Values>>} */
const cache = new Map();
/** @type {Map<string, number>} */
const sizes = new Map();

/** Of a page in a notebook's widget: the way to the kernel, which reads the files. @type {Promise<MessagePort> | null} */
export const kernel = !document.querySelector('meta[name="files"]') ? null : new Promise((resolve) => {
  addEventListener("message", function listen({ source, data, ports }) {
    if (source !== parent || data !== "zarrtrace" || !ports[0]) return;
    removeEventListener("message", listen);
    ports[0].addEventListener("message", ({ data: said }) => {
      waiting.get(said.id)?.(said);
      waiting.delete(said.id);
    });
    ports[0].start();
    resolve(ports[0]);
  });
});
/** Who waits for a file, by the number of the request. @type {Map<number, (said: any) => void>} */
const waiting = new Map();
let requests = 0;

/** @param {string} path @returns {Promise<Response>} */
async function fromKernel(path) {
  const port = await /** @type {Promise<MessagePort>} */ (kernel), id = requests++;
  const said = await new Promise((/** @type {(said: any) => void} */ resolve) => {
    waiting.set(id, resolve);
    port.postMessage({ id, path });
  });
  if (said.error) throw new DamagedError(said.error);
  return new Response(said.bytes);
}

/** @param {string} text @returns {Uint8Array<ArrayBuffer>} */
function fromBase64(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/**
 * Return a file of the bundle, from the page itself or from its folder.
 * @param {string} path
 * @returns {Promise<Response>}
 */
export async function file(path) {
  if (kernel) return fromKernel(path);
  if (inline) {
    if (!(path in inline)) throw new DamagedError(`${path} is not in this file.`);
    return new Response(fromBase64(inline[path]));
  }
  /** @type {Response} */
  let response;
  try {
    response = await fetch(path.split("/").map(encodeURIComponent).join("/"));
  } catch {
    throw new DamagedError(`${path} cannot be fetched: nothing answers. Was "zarrtrace view" stopped?`);
  }
  if (!response.ok) {
    const said = response.status === 500 ? (await response.text()).trim() : "";
    throw new DamagedError(said || `${path} is missing (${response.status}).`);
  }
  return response;
}

/** @returns {Promise<Index>} */
export async function openIndex() {
  const holder = document.getElementById("bundle-files");
  if (holder) inline = JSON.parse(holder.textContent || "{}");
  /** @type {Index} */
  const index = await (await file("index.json")).json();
  if (index.version !== VERSION) {
    throw new DamagedError(`This page reads layout ${VERSION}, index.json is ${index.version}.`);
  }
  return index;
}

/**
 * Return what a packed file says.
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function packed(path) {
  const { body } = await file(path);
  const stream = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (body);
  try {
    return await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json();
  } catch {
    throw new DamagedError(`${path} is damaged.`);
  }
}

/**
 * Unpack one chunk.
 * @param {ArrayInfo} array
 * @param {number[]} place
 * @returns {Promise<Values>}
 */
async function fetchChunk(array, place) {
  const path = `data/${array.path}/c/${place.join("/")}`;
  const response = await file(path);
  /** @type {ArrayBuffer} */
  let bytes;
  try {
    const stream = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body);
    bytes = await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  } catch {
    throw new DamagedError(`${path} is damaged.`);
  }
  const count = array.chunks.reduce((a, b) => a * b, 1);
  if (bytes.byteLength !== count * (array.dtype === "uint8" ? 1 : 4)) {
    throw new DamagedError(`${path} has another size than index.json says.`);
  }
  if (array.dtype === "float32") return new Float32Array(bytes);
  if (array.dtype === "uint32") return new Uint32Array(bytes);
  const values = new Float32Array(count);
  const scale = array.scale || 1;
  new Uint8Array(bytes).forEach((code, i) => {
    values[i] = code === array.missing ? NaN : code * scale;
  });
  return values;
}

/**
 * Return one chunk, from the cache if it is there.
 * @param {ArrayInfo} array
 * @param {number[]} place
 * @returns {Promise<Values>}
 */
export function chunk(array, place) {
  const key = `${array.path}/${place.join("/")}`;
  const known = cache.get(key);
  if (known) {
    cache.delete(key); // last used goes to the end
    cache.set(key, known);
    return known;
  }
  const found = fetchChunk(array, place);
  cache.set(key, found);
  sizes.set(key, 0);
  found.then(
    (values) => {
      sizes.set(key, values.byteLength);
      let total = [...sizes.values()].reduce((a, b) => a + b, 0);
      for (const old of cache.keys()) {
        if (total <= CACHE_BYTES || old === key) break;
        total -= sizes.get(old) || 0;
        cache.delete(old);
        sizes.delete(old);
      }
    },
    () => cache.delete(key), // a chunk that failed may be there the next time
  );
  return found;
}

/** Windows of long prompts that were put together last. @type {Map<string, Promise<Block>>} */
const windows = new Map();
const KEPT_WINDOWS = 8;

/**
 * Return matrices over (query, key) for the windows that begin at two tokens.
 * @param {ArrayInfo} array its last two dimensions are query and key
 * @param {number[]} lead chunk indices before them
 * @param {number} firstRow
 * @param {number} firstColumn
 * @returns {Promise<Block>}
 */
export function block(array, lead, firstRow, firstColumn) {
  if (array.shape[array.shape.length - 1] <= WINDOW) return assemble(array, lead, firstRow, firstColumn);
  const key = [array.path, ...lead, firstRow, firstColumn].join("/");
  const found = windows.get(key) || assemble(array, lead, firstRow, firstColumn);
  windows.delete(key); // last used goes to the end
  windows.set(key, found);
  found.catch(() => windows.delete(key));
  for (const old of windows.keys()) {
    if (windows.size <= KEPT_WINDOWS) break;
    windows.delete(old);
  }
  return found;
}

/**
 * @param {ArrayInfo} array @param {number[]} lead @param {number} firstRow @param {number} firstColumn
 * @returns {Promise<Block>}
 */
async function assemble(array, lead, firstRow, firstColumn) {
  const [tokens, keys] = array.shape.slice(-2);
  const [stepRows, stepColumns] = array.chunks.slice(-2);
  const count = array.chunks.slice(0, -2).reduce((a, b) => a * b, 1);
  const rows = Math.min(WINDOW, tokens - firstRow);
  const columns = Math.min(WINDOW, keys - firstColumn);
  const column = Math.floor(firstColumn / stepColumns);
  const first = Math.floor(firstRow / stepRows);
  const last = Math.floor((firstRow + rows - 1) / stepRows);
  const parts = await Promise.all(
    Array.from({ length: last - first + 1 }, (_, i) => chunk(array, [...lead, first + i, column])),
  );
  const shown = { count, rows, columns, firstRow, firstColumn };
  if (parts.length === 1 && stepRows === rows && stepColumns === columns) {
    return { data: /** @type {Float32Array} */ (parts[0]), ...shown };
  }
  const data = new Float32Array(count * rows * columns);
  for (let m = 0; m < count; m++) {
    for (let row = 0; row < rows; row++) {
      const at = firstRow + row;
      const part = parts[Math.floor(at / stepRows) - first];
      const from = (m * stepRows + (at % stepRows)) * stepColumns;
      data.set(/** @type {Float32Array} */ (part.subarray(from, from + columns)),
        (m * rows + row) * columns);
    }
  }
  return { data, ...shown };
}

/**
 * Return one token's values of an array (layer, query, rank) or (query, rank).
 * @param {ArrayInfo} array
 * @param {number} token
 * @param {number} [layer] index along the first dimension
 * @returns {Promise<Values>}
 */
export async function ofToken(array, token, layer = 0) {
  const [step, width] = array.chunks.slice(-2);
  const lead = array.chunks.length > 2 ? [0] : [];
  const values = await chunk(array, [...lead, Math.floor(token / step), 0]);
  const from = (layer * step + (token % step)) * width;
  return values.subarray(from, from + array.shape[array.shape.length - 1]);
}

/**
 * Return one feature over layers and the tokens of a window, (layer, token).
 * @param {ArrayInfo} array (layer, query, feature)
 * @param {number} feature
 * @param {number} firstToken
 * @returns {Promise<{data: Float32Array, layers: number, tokens: number}>}
 */
export async function timeline(array, feature, firstToken) {
  const [layers, all] = array.shape;
  const [, step, width] = array.chunks;
  const values = await chunk(array, [0, Math.floor(firstToken / step), Math.floor(feature / width)]);
  const tokens = Math.min(step, all - firstToken);
  const data = new Float32Array(layers * tokens);
  for (let layer = 0; layer < layers; layer++) {
    for (let token = 0; token < tokens; token++) {
      data[layer * tokens + token] = values[(layer * step + token) * width + (feature % width)];
    }
  }
  return { data, layers, tokens };
}

/**
 * Return the last axis at one feature of an array (…, feature, n).
 * @param {ArrayInfo} array
 * @param {number[]} lead indices before the feature, each of chunk size 1
 * @param {number} feature
 * @returns {Promise<Values>}
 */
export async function ofFeature(array, lead, feature) {
  const [step, width] = array.chunks.slice(-2);
  const values = await chunk(array, [...lead, Math.floor(feature / step), 0]);
  const from = (feature % step) * width;
  return values.subarray(from, from + width);
}

/**
 * Where a layer is along an array's first dimension, -1 if the array lacks it.
 * @param {ArrayInfo | undefined} array
 * @param {number} layer
 */
export function placeOf(array, layer) {
  return array && array.layers ? array.layers.indexOf(layer) : -1;
}

/** The place of a map of heads that is one token, whichever it is; as in arrays.py. */
export const STRONGEST = "@strongest";

/** Places of a scenario's map of heads: its spans, then the strongest token. @param {{arrays: Record<string, ArrayInfo>}} of */
export function placesOf(of) {
  return of.arrays.attention_to_spans?.places || [];
}

/**
 * Return a token's attention to each place, (layer, head, place).
 * @param {ArrayInfo} array (query, layer, head, place)
 * @param {number} token
 * @returns {Promise<Values>}
 */
export async function toSpans(array, token) {
  const [step, ...rest] = array.chunks;
  const size = rest.reduce((a, b) => a * b, 1);
  const values = await chunk(array, [Math.floor(token / step), 0, 0, 0]);
  return values.subarray((token % step) * size, (token % step + 1) * size);
}

/** First token of the window that holds a token. @param {number} token @param {number} tokens */
export function windowOf(token, tokens) {
  return tokens <= WINDOW ? 0 : Math.floor(token / WINDOW) * WINDOW;
}
