/** A text field that chooses from a list below it, by keyboard or pointer. */

import { element } from "./draw.js";

/**
 * A row that can be chosen. @param {string} key what tells it from the others
 * @param {Record<string, string>} data what it chooses @param {(Node | string)[]} shown
 */
export function option(key, data, ...shown) {
  const row = element("div", { role: "option", class: "choice", "aria-selected": "false" }, ...shown);
  Object.assign(row.dataset, data, { key });
  return row;
}

/** Rows below a heading. @param {string} name @param {HTMLElement[]} rows */
export function group(name, rows) {
  return element("div", { role: "group", class: "choices-group", "aria-label": name },
    element("div", { class: "choices-name", "aria-hidden": "true" }, name), ...rows);
}

/** A line that cannot be chosen. @param {string} text */
export const note = (text) => element("div", { class: "choices-note" }, text);

/**
 * Choose among the options in a list by the keys of a field, which keeps the focus.
 * @param {HTMLInputElement} field
 * @param {HTMLElement} list
 * @param {(option: HTMLElement) => void} pick
 * @param {() => boolean} isOpen
 */
export function choices(field, list, pick, isOpen) {
  /** @type {HTMLElement | null} */
  let active = null;
  const options = () => /** @type {HTMLElement[]} */ ([...list.querySelectorAll("[role=option]")]);
  /** @param {HTMLElement | null} row */
  const mark = (row) => {
    active?.classList.remove("active");
    active?.removeAttribute("id");
    active = row;
    if (!row) {
      field.removeAttribute("aria-activedescendant");
      return;
    }
    row.classList.add("active");
    row.id = `${list.id}-active`;
    field.setAttribute("aria-activedescendant", row.id);
    row.scrollIntoView({ block: "nearest" });
  };
  const steps = /** @type {Record<string, number>} */ ({ ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 });
  field.addEventListener("keydown", (event) => {
    if (!isOpen()) return;
    const all = options(), step = steps[event.key];
    if (step) {
      const at = active ? all.indexOf(active) : step > 0 ? -1 : all.length;
      // One step beyond an end goes to the other; a page stops there.
      const to = Math.abs(step) === 1 ? (at + step + all.length) % all.length : Math.max(0, Math.min(all.length - 1, at + step));
      mark(all[to] || null);
    } else if (event.key === "Enter") {
      const row = active || all[0];
      if (row) pick(row);
    } else return;
    event.preventDefault();
  });
  list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
  list.addEventListener("click", (event) => {
    const row = /** @type {HTMLElement} */ (event.target).closest("[role=option]");
    if (row instanceof HTMLElement) pick(row);
  });
  return {
    /** Show rows; the one that was marked stays so. @param {HTMLElement[]} rows @param {string} [key] the one to mark */
    show(rows, key = active?.dataset.key) {
      list.replaceChildren(...rows);
      mark(options().find((row) => row.dataset.key === key) || null);
    },
    forget: () => mark(null),
  };
}
