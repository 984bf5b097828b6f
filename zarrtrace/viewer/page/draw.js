/** Colours, heatmaps, lines, and pictures to copy. */

/** @typedef {import("./types.js").View} View */

/** Colours of spans; each is told apart from its neighbours also by people who see few colours. */
const LIGHT_SPANS = ["#0072b2", "#b35900", "#00795c", "#a3437b", "#710fb2", "#70161a", "#343074", "#4b2147"];
const DARK_SPANS = ["#6cb8ee", "#f0a04b", "#4ccfa6", "#ee9cc8", "#7f75f8", "#988552", "#f6ce35", "#bff7aa"];

/** @type {Record<string, number[][]>} */
const STOPS = {
  light: [[255, 255, 255], [219, 233, 246], [137, 190, 220], [48, 121, 182], [8, 48, 107], [3, 18, 48]],
  dark: [[17, 22, 31], [28, 47, 84], [35, 98, 158], [56, 168, 190], [178, 226, 160], [255, 250, 205]],
  lightDifference: [[5, 48, 97], [67, 147, 195], [255, 255, 255], [214, 96, 77], [103, 0, 31]],
  darkDifference: [[150, 205, 255], [50, 110, 180], [17, 22, 31], [190, 80, 50], [255, 190, 150]],
};

/** @type {Map<string, Uint32Array>} */
const tables = new Map();

/** @returns {"light" | "dark"} */
export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/** @param {number} at */
export function spanColour(at) {
  const colours = theme() === "dark" ? DARK_SPANS : LIGHT_SPANS;
  return colours[at % colours.length];
}

/** @param {string} name @returns {Uint32Array} 256 colours as ImageData holds them */
function table(name) {
  const known = tables.get(name);
  if (known) return known;
  const stops = STOPS[name];
  const out = new Uint32Array(257);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    const [r, g, b] = stops[low].map((c, k) => Math.round(c + (stops[low + 1][k] - c) * (at - low)));
    out[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  out[256] = name.startsWith("dark") ? 0xff3a3230 : 0xffe4dedc; // no value
  tables.set(name, out);
  return out;
}

/**
 * Draw a matrix, one pixel a value; CSS scales it up. Square-root scale: small weights matter.
 * @param {HTMLCanvasElement} canvas
 * @param {Float32Array} data
 * @param {number} from index of the first value
 * @param {number} rows
 * @param {number} columns
 * @param {{max?: number, difference?: boolean, byRow?: boolean, firstKey?: number}} [options]
 *   byRow: the strongest colour is each row's largest value, its first token left out
 */
export function heat(canvas, data, from, rows, columns, { max = 1, difference = false, byRow = false, firstKey = 1 } = {}) {
  if (canvas.width !== columns || canvas.height !== rows) {
    canvas.width = columns;
    canvas.height = rows;
  }
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const colours = table(difference ? `${theme()}Difference` : theme());
  let scale = max > 0 ? 1 / max : 0;
  // A layer has half a million values: comparisons, which NaN fails, are faster than Math's functions.
  for (let i = 0; i < pixels.length; i++) {
    if (byRow && i % columns === 0) {
      let most = 0;
      for (let k = firstKey === 0 ? 1 : 0; k < columns; k++) if (data[from + i + k] > most) most = data[from + i + k];
      scale = most > 0 ? 1 / most : 0;
    }
    const value = data[from + i] * scale, size = difference && value < 0 ? -value : value;
    const root = size >= 1 ? 1 : size > 0 ? Math.sqrt(size) : 0;
    if (value !== value) pixels[i] = colours[256];
    else if (!difference) pixels[i] = colours[(255 * root + 0.5) | 0];
    else pixels[i] = colours[(128 + 127.5 * (value < 0 ? -root : root)) | 0];
  }
  context.putImageData(image, 0, 0);
}

/** @typedef {{width: number, height: number, font: string, ink: string, accent: string}} Box */
/** Elements as they are laid out. @type {WeakMap<HTMLElement, Box>} */
let boxes = new WeakMap();

/**
 * The size of an element in pixels, and its font and colours. They are kept: to ask the browser for them
 * makes it lay out at once all that has changed, and a choice draws several panels.
 * @param {HTMLElement} of @returns {Box}
 */
export function boxOf(of) {
  let found = boxes.get(of);
  if (!found?.width) {
    const style = getComputedStyle(of);
    found = { width: of.clientWidth, height: of.clientHeight, font: `11px ${style.fontFamily}`, ink: style.color,
      accent: style.getPropertyValue("--accent") };
    boxes.set(of, found);
  }
  return found;
}

/** Forget how elements are laid out: the page has another width or theme, or a part of it. @param {Iterable<Element>} [some] */
export function forgetBoxes(some) {
  if (!some) boxes = new WeakMap();
  else for (const one of some) boxes.delete(/** @type {HTMLElement} */ (one));
}

/**
 * A context to draw on a canvas in CSS pixels, at the screen's resolution.
 * @param {HTMLCanvasElement} canvas @returns {CanvasRenderingContext2D}
 */
function sharp(canvas) {
  const ratio = window.devicePixelRatio || 1, { width, height, font } = boxOf(canvas);
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(ratio, ratio);
  context.font = font;
  return context;
}

/**
 * Draw lines over layers.
 * @param {HTMLCanvasElement} canvas
 * @param {{name: string, colour: string, values: number[]}[]} lines
 * @param {number[]} layers
 * @param {number} chosen the layer to mark
 */
export function lines(canvas, lines, layers, chosen) {
  const { width, height, ink } = boxOf(canvas), context = sharp(canvas);
  const left = 38, right = 10, top = 8, bottom = 20;
  const max = Math.max(0, ...lines.flatMap((line) => line.values.filter(Number.isFinite))) || 1;
  const x = (/** @type {number} */ i) =>
    left + ((width - left - right) * i) / Math.max(1, layers.length - 1);
  const y = (/** @type {number} */ v) => height - bottom - ((height - top - bottom) * v) / max;
  context.fillStyle = context.strokeStyle = ink;
  context.globalAlpha = 0.75;
  context.textAlign = "right";
  for (const part of [0, 0.5, 1]) {
    context.fillText(readable(max * part), left - 5, y(max * part) + 4);
    context.globalAlpha = 0.15;
    context.fillRect(left, y(max * part), width - left - right, 1);
    context.globalAlpha = 0.75;
  }
  context.textAlign = "center";
  const every = Math.max(1, Math.ceil(layers.length / Math.max(2, Math.floor(width / 48))));
  layers.forEach((layer, i) => {
    if (i % every === 0) context.fillText(`L${layer}`, x(i), height - 5);
  });
  const at = layers.indexOf(chosen);
  if (at >= 0) {
    context.globalAlpha = 0.35;
    context.fillRect(x(at) - 0.5, top, 1, height - top - bottom);
  }
  context.globalAlpha = 1;
  for (const line of lines) {
    context.strokeStyle = line.colour;
    context.lineWidth = 2;
    context.beginPath();
    let down = false;
    line.values.forEach((value, i) => {
      if (!Number.isFinite(value)) down = false;
      else if (down) context.lineTo(x(i), y(value));
      else {
        context.moveTo(x(i), y(value));
        down = true;
      }
    });
    context.stroke();
  }
}

/** Numbers of bars of a histogram. */
const BINS = 12;

/**
 * Draw how many values lie in each of twelve equal parts of their range, from 0.
 * @param {HTMLCanvasElement} canvas
 * @param {number[]} values
 */
export function histogram(canvas, values) {
  const { width, height, ink, accent } = boxOf(canvas), context = sharp(canvas);
  const low = Math.min(0, ...values), high = Math.max(0, ...values), counts = Array(BINS).fill(0);
  for (const value of values) counts[Math.min(BINS - 1, Math.floor((BINS * (value - low)) / (high - low)))]++;
  canvas.dataset.counts = counts.join();
  const most = Math.max(...counts);
  const left = 30, bottom = 16, top = 12, bar = (width - left - 4) / BINS, tall = height - top - bottom;
  context.fillStyle = accent;
  counts.forEach((count, i) => {
    const size = (tall * count) / most;
    context.fillRect(left + i * bar + 1, top + tall - size, bar - 2, size);
  });
  context.fillStyle = ink;
  context.fillRect(left, top + tall, width - left - 4, 1);
  context.textAlign = "right";
  context.fillText(String(most), left - 5, top + 8);
  context.fillText("0", left - 5, top + tall);
  [low, (low + high) / 2, high].forEach((value, i) => {
    context.textAlign = /** @type {CanvasTextAlign[]} */ (["left", "center", "right"])[i];
    context.fillText(readable(value), left + (i * (width - left - 4)) / 2, height - 3);
  });
}

/**
 * Make an element; text is always text.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, string>} [attributes]
 * @param {(Node | string)[]} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const out = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) out.setAttribute(name, value);
  out.append(...children);
  return out;
}

/** A number as people read it, the same in all panels: three digits, or whole. @param {number} value */
export function readable(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = value === 0 ? "0" : size < 1e-3 ? value.toExponential(2)
    : size < 999.5 ? value.toPrecision(3) : String(Math.round(value));
  return text.replace(/-/g, "−");
}

/** Write a text; one that stands there already is not laid out again. @param {Element} out @param {string} text */
export function setText(out, text) {
  if (out.textContent !== text) out.textContent = text;
}

/** A number as people read it, and exactly for programs. @param {number} value */
export function number(value) {
  return setNumber(/** @type {HTMLDataElement} */ (element("data")), value);
}

/** Change a number that is shown. @param {HTMLDataElement} shown @param {number} value */
export function setNumber(shown, value) {
  shown.value = String(value);
  setText(shown, readable(value));
  return shown;
}

/**
 * Show a list as bars. Rows that are there already are filled again: to make them anew takes the
 * browser several times as long, and hovering fills forty.
 * @template Item
 * @param {HTMLElement} list
 * @param {Item[]} items
 * @param {() => HTMLElement} make an empty row
 * @param {(row: HTMLElement, item: Item) => number} fill writes an item, returns the bar's length, 0 to 1
 */
export function bars(list, items, make, fill) {
  list.querySelector(".none")?.remove();
  while (list.children.length > items.length) list.lastElementChild?.remove();
  while (list.children.length < items.length) list.append(make());
  items.forEach((item, i) => {
    const row = /** @type {HTMLElement} */ (list.children[i]);
    // Not by a custom property, which all that is in the row would inherit.
    row.style.backgroundSize = `${(100 * Math.min(1, fill(row, item) || 0)).toFixed(1)}% 100%`;
  });
}

/** A token's text where white space must show. @param {string} text */
export function visible(text) {
  if (text === "") return "∅";
  return /^\s+$/.test(text)
    ? text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣")
    : text;
}

/** Text of several tokens on one line. @param {string} text */
export const spaced = (text) => text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");

/** A token's text in an element of its own direction. @param {string} text */
export function tokenText(text) {
  return element("bdi", { class: "token-text" }, visible(text));
}

/** A token by its position and text. @param {{tokens: string[]}} of @param {number} token @returns {[string, HTMLElement]} */
export function named(of, token) {
  return [`${token} `, tokenText(of.tokens[token])];
}

/** Replace what a panel shows by a message. @param {HTMLElement} panel @param {unknown} error */
export function fail(panel, error) {
  const note = panel.querySelector(".message");
  if (note instanceof HTMLElement) {
    setText(note, error ? String(error instanceof Error ? error.message : error) : "");
    if (note.hidden !== !error) note.hidden = !error;
  }
  panel.classList.toggle("failed", Boolean(error));
}

/**
 * Paint the canvases and labels of a panel as they stand on the page.
 * @param {HTMLElement} panel
 * @param {string} caption what the picture is of, written below
 * @returns {HTMLCanvasElement}
 */
export function picture(panel, caption) {
  const scale = 2, foot = 26;
  const box = panel.getBoundingClientRect();
  const shown = [...panel.querySelectorAll("canvas, [data-label]")].filter((one) => one.checkVisibility());
  const height = Math.max(...shown.map((one) => one.getBoundingClientRect().bottom)) - box.top;
  const out = element("canvas");
  out.width = Math.ceil(box.width * scale);
  out.height = Math.ceil((height + foot) * scale);
  const context = /** @type {CanvasRenderingContext2D} */ (out.getContext("2d"));
  context.scale(scale, scale);
  context.fillStyle = getComputedStyle(panel).backgroundColor;
  context.fillRect(0, 0, box.width, height + foot);
  context.imageSmoothingEnabled = false;
  for (const canvas of shown) {
    if (!(canvas instanceof HTMLCanvasElement)) continue;
    const at = canvas.getBoundingClientRect();
    if (at.width && canvas.width) {
      context.drawImage(canvas, at.left - box.left, at.top - box.top, at.width, at.height);
    }
  }
  for (const line of panel.querySelectorAll(".end")) {
    const at = line.getBoundingClientRect();
    context.fillStyle = getComputedStyle(line).backgroundColor;
    context.fillRect(at.left - box.left, at.top - box.top, at.width, at.height);
  }
  context.textBaseline = "middle";
  for (const label of shown) {
    if (label instanceof HTMLCanvasElement) continue;
    const at = label.getBoundingClientRect();
    if (!at.width) continue;
    const style = getComputedStyle(label);
    context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    context.fillStyle = style.color;
    context.fillText(label.textContent || "", at.left - box.left, (at.top + at.bottom) / 2 - box.top, at.width);
  }
  const style = getComputedStyle(panel);
  context.font = `12px ${style.fontFamily}`;
  context.fillStyle = style.color;
  context.fillText(caption, 14, height + foot / 2, box.width - 28);
  return out;
}

/**
 * Copy a panel as PNG; where the clipboard is closed to pages, save it.
 * @param {HTMLElement} panel
 * @param {string} caption
 * @returns {Promise<"copied" | "saved">}
 */
export async function copyPicture(panel, caption) {
  const canvas = picture(panel, caption);
  const blob = await new Promise(
    (/** @type {(blob: Blob) => void} */ done, reject) =>
      canvas.toBlob((made) => (made ? done(made) : reject(new Error("no picture"))), "image/png"));
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    return "copied";
  } catch {
    const link = element("a", { download: `${panel.id}.png`, href: URL.createObjectURL(blob) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    return "saved";
  }
}
