/** What stands around a matrix: the cell that is pointed at, its axes, the scale of its colours. */

import { boxOf, element, forgetBoxes, heat, number, spanColour, theme, visible } from "./draw.js";
import { isAllGenerated } from "./state.js";

/** @typedef {import("./types.js").Scenario} Scenario */

const STEPS = /** @type {Record<string, number[]>} */ ({
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] });

/**
 * Let a matrix be pointed at, by the pointer or by arrow keys; a click or Enter picks.
 * @param {HTMLCanvasElement} canvas
 * @param {() => [number, number]} size rows and columns, 0 if nothing is drawn
 * @param {(row: number, column: number) => void} show
 * @param {(row: number, column: number) => void} pick
 * @returns {(row: number, column: number) => void} points at a cell
 */
export function cells(canvas, size, show, pick) {
  /** @type {[number, number]} */
  let at = [0, 0];
  const point = (/** @type {number} */ row, /** @type {number} */ column) => {
    const [rows, columns] = size();
    if (!rows || !columns) return false;
    at = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    show(...at);
    return true;
  };
  const under = (/** @type {MouseEvent} */ event) => {
    const box = canvas.getBoundingClientRect(), [rows, columns] = size();
    return point(Math.floor(((event.clientY - box.top) / box.height) * rows),
      Math.floor(((event.clientX - box.left) / box.width) * columns));
  };
  const tip = /** @type {HTMLElement} */ (document.getElementById("tip"));
  /** Show at the pointer what the line below the matrix says. @param {PointerEvent} event */
  const hover = (event) => {
    tip.hidden = !under(event) || event.pointerType === "touch" || !cell;
    if (tip.hidden || !cell) return;
    tip.textContent = cell.textContent;
    const right = event.clientX > innerWidth / 2;
    tip.style.setProperty("--x", `${event.clientX + (right ? -12 : 14)}px`);
    tip.style.setProperty("--y", `${event.clientY + 16}px`);
    tip.classList.toggle("left", right);
  };
  // The cell is read out while the matrix has the focus, not whenever something is drawn anew.
  const cell = document.getElementById(canvas.getAttribute("aria-describedby") || "");
  canvas.addEventListener("focus", () => cell?.setAttribute("aria-live", "polite"));
  canvas.addEventListener("blur", () => cell?.removeAttribute("aria-live"));
  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("click", (event) => under(event) && pick(...at));
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (step) point(at[0] + step[0], at[1] + step[1]);
    else if (event.key === "Enter") pick(...at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return point;
}

/**
 * A mark on an axis, in per cent of its length.
 * @param {string} kind @param {string} text @param {number} at
 */
function mark(kind, text, at) {
  const out = element("span", { class: kind, "data-label": "" }, text);
  out.style.setProperty("--at", `${(100 * at).toFixed(2)}%`);
  return out;
}

/** Up to this many tokens, an axis shows their texts. */
const READABLE = 40;

/**
 * An axis of tokens: their positions, or the texts of few, and the spans in their colours.
 * @param {string} id element of class "ruler"
 * @param {Scenario} of
 * @param {[number, number][]} units [start, end) of the tokens at each place
 * @param {boolean} [numbered] whether to write positions
 */
export function tokenRuler(id, of, units, numbered = true) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  const count = units.length, { width } = boxOf(out);
  const key = [theme(), of.name, count, units[0], units[count - 1], numbered, width].join();
  if (out.dataset.shown === key) return;
  out.dataset.shown = key;
  const down = out.classList.contains("down");
  const band = element("canvas", { "aria-hidden": "true" });
  [band.width, band.height] = down ? [1, count] : [count, 1];
  const texts = numbered && count <= READABLE && (down || width / count >= 13);
  if (out.classList.contains("texts") !== texts) {
    out.classList.toggle("texts", texts);
    forgetBoxes(out.parentElement?.children); // the axis below has another width
  }
  const every = texts ? 1 : [1, 2, 5, 10, 20, 50, 100].find((step) => count / step <= 7) || 200;
  const marks = !numbered ? [] : units.flatMap(([start], i) =>
    (start % every ? [] : [mark("tick", texts ? visible(of.tokens[start]) : String(start), (i + 0.5) / count)]));
  const spans = Object.keys(of.spans).map((name, n) => ({ name, colour: spanColour(n),
    at: units.flatMap(([start, end], i) => (of.spans[name].some((t) => t >= start && t < end) ? [i] : [])) }))
    .filter(({ name }) => !isAllGenerated(of, name));
  const context = /** @type {CanvasRenderingContext2D} */ (band.getContext("2d"));
  for (const { colour, at } of spans) {
    context.fillStyle = colour;
    for (const i of at) context.fillRect(down ? 0 : i, down ? i : 0, 1, 1);
  }
  if (!down) marks.push(...spanNames(out, spans.filter(({ at }) => at.length), count, width));
  out.replaceChildren(band, ...marks);
}

/**
 * Names of spans below an axis, by position; one that would touch another goes to a line below.
 * @param {HTMLElement} out @param {{name: string, colour: string, at: number[]}[]} spans
 * @param {number} count @param {number} width
 */
function spanNames(out, spans, count, width) {
  /** Where each line is taken up to, in pixels. @type {number[]} */
  const lines = [];
  const middle = (/** @type {number[]} */ at) => (at[0] + at[at.length - 1] + 1) / 2 / count;
  const marks = spans.sort((a, b) => middle(a.at) - middle(b.at)).map(({ name, colour, at }) => {
    const wide = Math.min(width, 8 + 6.6 * name.length);
    const left = Math.max(0, Math.min(width - wide, middle(at) * width - wide / 2));
    let line = lines.findIndex((end) => end <= left);
    if (line < 0) line = lines.length;
    lines[line] = left + wide;
    const label = mark("name", name, (left + wide / 2) / Math.max(1, width));
    label.style.setProperty("--line", String(line));
    label.style.color = colour;
    return label;
  });
  out.style.setProperty("--lines", String(lines.length));
  return marks;
}

/** An axis of heads, from the left. @param {string} id @param {number} heads @param {number} chosen */
export function headRuler(id, heads, chosen) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  const every = Math.ceil(heads / 8);
  out.replaceChildren(...Array.from({ length: heads }, (_, head) => head)
    .filter((head) => head === chosen || (head % every === 0 && (chosen < 0 || Math.abs(head - chosen) >= every)))
    .map((head) => {
      const tick = mark("tick", `H${head}`, (head + 0.5) / heads);
      tick.classList.toggle("chosen", head === chosen);
      return tick;
    }));
}

/**
 * Mark where the prompt ends: a line in a matrix of tokens, or none.
 * @param {HTMLCanvasElement} canvas
 * @param {Scenario} of
 * @param {[number, number][]} across [start, end) of the tokens at each column
 * @param {[number, number][]} [down] of those at each row, if rows are tokens
 */
export function promptEnd(canvas, of, across, down = []) {
  let line = canvas.nextElementSibling;
  if (!line?.classList.contains("ends")) canvas.after((line = element("div", { class: "ends", "aria-hidden": "true" })));
  const from = of.generated ? of.generated.from : Infinity;
  const lines = [["x", across], ["y", down]].flatMap(([way, units]) => {
    const at = /** @type {[number, number][]} */ (units).findIndex(([start]) => start >= from);
    if (at <= 0) return []; // all of one kind
    const one = element("span", { class: `end ${way}` });
    one.style.setProperty("--at", `${((100 * at) / units.length).toFixed(3)}%`);
    return [one];
  });
  line.replaceChildren(...lines);
}

/** An axis of layers, from the top down. @param {string} id @param {number[]} layers @param {number} chosen */
export function layerRuler(id, layers, chosen) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  const every = Math.ceil(layers.length / 8), place = layers.indexOf(chosen);
  const shown = layers.map((_, i) => i === place || (i % every === 0 && Math.abs(i - place) >= every));
  out.replaceChildren(...layers.flatMap((layer, i) => {
    if (!shown[i]) return [];
    const tick = mark("tick", `L${layer}`, (i + 0.5) / layers.length);
    tick.classList.toggle("chosen", i === place);
    return [tick];
  }));
}

/**
 * The scale of a matrix's colours, which go with the square root of the value.
 * @param {string} id @param {{max?: number, difference?: boolean}} [options] as for heat()
 */
export function scale(id, { max = 1, difference = false } = {}) {
  const out = /** @type {HTMLElement} */ (document.getElementById(id));
  const key = [theme(), max, difference].join();
  if (out.dataset.shown === key) return;
  out.dataset.shown = key;
  const bar = element("canvas", { "aria-hidden": "true" });
  const values = Float32Array.from({ length: 128 }, (_, i) => {
    const share = difference ? i / 63.5 - 1 : i / 127;
    return max * share * Math.abs(share);
  });
  heat(bar, values, 0, 1, 128, { max, difference });
  const labels = difference ? [-max, 0, max] : [0, max / 4, max];
  out.replaceChildren(bar, ...labels.map((value) => {
    const label = number(value);
    label.setAttribute("data-label", "");
    return label;
  }));
}

/** Each token of a window by itself. @param {number} first @param {number} count @returns {[number, number][]} */
export function single(first, count) {
  return Array.from({ length: count }, (_, i) => [first + i, first + i + 1]);
}
