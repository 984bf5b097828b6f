/** The list of scenarios: searched by name, tag and metadata, shown in groups. */

import { choices, group, note, option } from "./choices.js";
import { element } from "./draw.js";
import { index, view } from "./state.js";
import { packed } from "./store.js";

/**
 * @typedef {Object} Entry
 * @property {string} name
 * @property {string[]} tags empty until the list has been read
 * @property {string} about metadata as people read it
 * @property {string} text all that is searched
 */

/** Rows of a list at most: browsers lay out thousands in a second. */
const MOST = 200;
/** Groups of a list at most; the others are behind "more". */
const MOST_GROUPS = 25;

/** @type {Entry[]} */
let entries = [];
/** @type {Promise<void> | null} */
let list = null;
/** Why a part of the list cannot be read. */
let problem = "";
/** Who is told when more of the list has been read. @type {(() => void)[]} */
const listeners = [];

/** Scenarios, by name only until readList() has read the rest. */
function all() {
  if (!entries.length) {
    entries = index.scenarios.map((name) => ({ name, tags: [], about: "", text: name.toLowerCase() }));
  }
  return entries;
}

async function readParts() {
  for (let part = 0; part * index.listed < index.scenarios.length; part++) {
    try {
      const { tags, metadata } = await packed(`data/@listing/${part}.json.gz`);
      all().slice(part * index.listed, (part + 1) * index.listed).forEach((entry, i) => {
        entry.tags = tags[i] || ["cannot be read"];
        entry.about = Object.entries(metadata[i]).map(([name, value]) => `${name}=${value}`).join(", ");
        entry.text = [entry.name, ...entry.tags, entry.about].join("\n").toLowerCase();
      });
    } catch (error) {
      problem = `Tags and metadata are not known: ${error instanceof Error ? error.message : error}`;
    }
    for (const listener of listeners) listener();
    if (problem) return;
  }
}

/** Read tags and metadata of all scenarios, part by part. */
export function readList() {
  list ||= readParts();
}

/** @param {() => void} listener told of every part */
export function onList(listener) {
  listeners.push(listener);
}

/** Scenarios that hold every word of a query, in the run's order. @param {string} query */
export function matching(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return words.length ? all().filter(({ text }) => words.every((word) => text.includes(word))) : all();
}

/** A scenario as a row. @param {Entry} entry @param {string[]} words of the query @param {boolean} isShown */
export function scenarioRow({ name, tags, about }, words = [], isShown = false) {
  // Metadata only where that is what was found.
  const found = about.split(", ").filter((one) => words.some((word) => one.toLowerCase().includes(word)));
  const row = option(name, { name }, element("bdi", {}, name),
    element("span", { class: "soft" }, [...tags.slice(1), ...found].join(", ")));
  if (isShown) row.setAttribute("aria-selected", "true");
  return row;
}

/** Scenarios by their first tag. @param {Entry[]} found @returns {[string, Entry[]][]} */
function byTag(found) {
  /** @type {Map<string, Entry[]>} */
  const groups = new Map();
  for (const entry of found) {
    const tag = entry.tags[0] || "", there = groups.get(tag);
    if (there) there.push(entry);
    else groups.set(tag, [entry]);
  }
  return [...groups];
}

/** Rows for a query. @param {string} query @param {string} chosen the scenario that is shown */
function rowsOf(query, chosen) {
  const found = matching(query), groups = byTag(found), words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const each = Math.max(4, Math.floor(MOST / Math.min(MOST_GROUPS, groups.length)));
  const out = groups.slice(0, MOST_GROUPS).map(([tag, members]) => {
    const shown = members.length <= each + 1 ? members : members.slice(0, each);
    const at = members.findIndex((entry) => entry.name === chosen);
    if (at >= shown.length) shown.push(members[at]);
    const rows = shown.map((entry) => scenarioRow(entry, words, entry.name === chosen)), more = members.length - shown.length;
    if (more && tag && groups.length > 1) rows.push(option(`more ${tag}`, { query: `${query} ${tag}`.trim() }, `${more.toLocaleString("en")} more of ${tag} …`));
    else if (more) rows.push(note(`${more.toLocaleString("en")} more: type a part of a name, tag or metadata`));
    return tag || groups.length > 1 ? group(tag || "no tag", rows) : group("scenarios", rows);
  });
  if (groups.length > MOST_GROUPS) out.push(note(`${(groups.length - MOST_GROUPS).toLocaleString("en")} more tags: type a part of one`));
  if (!found.length) out.push(note("no scenario has this in its name, tags or metadata"));
  if (problem) out.unshift(note(problem));
  return out;
}

/**
 * Make a field choose a scenario.
 * @param {"scenario" | "other"} id
 * @param {(name: string) => void} pick
 * @param {string} [none] the row that chooses none
 */
export function chooser(id, pick, none) {
  const field = /** @type {HTMLInputElement} */ (document.getElementById(id));
  const list = /** @type {HTMLElement} */ (document.getElementById(`${id}-list`));
  const isOpen = () => !list.hidden;
  let isTyped = false;
  const close = () => {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.value = view[id];
    list.replaceChildren();
    of.forget();
  };
  const of = choices(field, list, (row) => {
    if (row.dataset.query !== undefined) {
      field.value = row.dataset.query;
      isTyped = true;
      draw("");
    } else {
      close();
      pick(row.dataset.name ?? "");
    }
  }, isOpen);
  const draw = (/** @type {string | undefined} */ key) => {
    const query = isTyped ? field.value : "";
    const rows = rowsOf(query, view[id]);
    if (none && !query) rows.unshift(option("", { name: "" }, none));
    of.show(rows, key);
  };
  const open = (/** @type {boolean} */ typed) => {
    isTyped = typed;
    readList();
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    draw(typed ? "" : view[id]);
  };
  onList(() => isOpen() && draw(undefined));
  field.addEventListener("input", () => open(true));
  field.addEventListener("click", () => {
    if (isOpen()) return;
    field.select();
    open(false);
  });
  field.addEventListener("focus", () => field.select());
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && isOpen()) close();
    else if (event.key === "ArrowDown" && !isOpen()) open(false);
    else return;
    event.preventDefault();
    event.stopImmediatePropagation(); // the list itself takes no step
  }, { capture: true });
}
