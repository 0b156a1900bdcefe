// @ts-check
// What our extensions share: panels below a node's widgets, elements whose text is never read as HTML, node ids.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/**
 * An element with properties, styles and children; strings become text nodes.
 * @param {string} tag
 * @param {Record<string, any>} [properties] `style` is an object, keys with a dash are attributes (aria-label)
 * @param {...(Node | string | null | undefined)} children
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") Object.assign(made.style, value);
    else if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

/**
 * How well something went, said by a mark as well as by a colour.
 * @typedef {"good" | "warn" | "bad" | "neutral"} Tone
 * @typedef {{ text: string, tone?: Tone }} Verdict
 * @type {Record<Tone, [mark: string, colour: string]>}
 */
const TONES = {
  good: ["\u2713", "#1f9d6b"],
  warn: ["!", "#b7791f"],
  bad: ["\u2717", "#d1495b"],
  neutral: ["", "var(--descrip-text)"],
};

/** A text in the colour of its tone, after its mark. @param {Verdict} verdict */
export function toned({ text, tone = "neutral" }) {
  const [mark, colour] = TONES[tone] ?? TONES.neutral;
  const plain = !mark;
  // mixed with the text's own colour it can be read in light themes and in dark ones
  const ink = plain ? "inherit" : `color-mix(in srgb, ${colour} 45%, var(--input-text))`;
  return element("div", {
    style: {
      display: "flex", gap: "6px", flexShrink: "0", color: ink,
      ...(plain ? {} : { borderLeft: `3px solid ${colour}`, paddingLeft: "6px", fontWeight: "600" }),
    },
  }, plain ? null : element("span", { "aria-hidden": "true", textContent: mark }),
  element("span", { textContent: text, style: { minWidth: "0" } }));
}

/**
 * The panel of a node, from top to bottom: its error, a note, what it has to show.
 * @typedef {{
 *   root: HTMLElement, alert: HTMLElement, note: HTMLElement, content: HTMLElement, tall: number, idle: string,
 *   height?: number | ((made: HTMLElement) => number), beside: () => boolean
 * }} Panel
 */

/** @type {WeakMap<any, Panel>} by node */
const panels = new WeakMap();
const MOST = 640; // pixels: a panel as tall as its content is no taller than that, and scrolls
const [MARGINS, PADDING] = [20, 8]; // around the element, by ComfyUI's page, and inside it, top and bottom together

/**
 * The element below a node's widgets where it shows what it has to show; made when it is first asked for.
 * Ask for it in `nodeCreated`: Nodes 2.0 of frontend 1.32 may not see a widget that comes later to a node with links.
 * @param {any} node
 * @param {string} name unique among the node's widgets
 * @param {{ height?: number | ((made: HTMLElement) => number), role?: string, label?: string, idle?: string,
 *   beside?: () => boolean }} [options]
 *   `height` is the least one, in pixels, of the element as it is, without it that of its content; `grow` applies one
 *   that has changed. `idle` is shown where there is no result. `beside` says whether what is shown now may stay
 *   beside an error.
 * @returns {HTMLElement}
 */
export function panel(node, name, { height, role = "status", label, idle = "", beside = () => false } = {}) {
  const known = panels.get(node);
  if (known) return known.content;
  const content = element("div", {
    role, textContent: idle, ...(label ? { "aria-label": label } : {}), style: { flex: "1 1 auto", minHeight: "0" },
  });
  const alert = element("div", { role: "alert", hidden: true });
  const note = element("div", { hidden: true, style: { flexShrink: "0", color: "var(--descrip-text)" } });
  const root = element("div", {
    style: {
      boxSizing: "border-box", height: "100%", overflow: "auto", padding: `${PADDING / 2}px 8px`, whiteSpace: "pre-wrap",
      overflowWrap: "anywhere", font: "12px/1.4 sans-serif", color: "var(--input-text)",
      background: "var(--comfy-input-bg)", borderRadius: "4px", userSelect: "text", flexDirection: "column", gap: "4px",
    },
  }, alert, note, content);
  const made = { root, alert, note, content, tall: 0, idle, height, beside };
  panels.set(node, made);
  const widget = node.addDOMWidget(name, name, root, { serialize: false, getMinHeight: () => made.tall });
  widget.serialize = false;
  grow(node);
  return content;
}

/** Make a node as large as its widgets need; never smaller than it is. */
export function grow(node) {
  const shown = panels.get(node);
  if (shown) measure(shown, node.size[0]);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
}

/** Find out how tall a panel must be on a node of this width; one without anything to show takes no room. */
function measure(/** @type {Panel} */ shown, /** @type {number} */ width) {
  const { root, alert, note, content, height } = shown;
  const open = content.parentElement === root; // no error stands in its place
  const seen = !alert.hidden || !note.hidden || (open && (height !== undefined || content.hasChildNodes()));
  root.style.display = seen ? "flex" : "none";
  shown.tall = 0;
  if (!seen) return;
  // a copy, because the panel itself may be out of sight
  const copy = /** @type {HTMLElement} */ (root.cloneNode(true));
  Object.assign(copy.style, {
    position: "fixed", top: "0", left: "0", visibility: "hidden", height: "auto", width: `${width - MARGINS}px`,
  });
  if (open && height !== undefined) {
    const least = typeof height === "function" ? height(content) : height;
    const { style } = /** @type {HTMLElement} */ (copy.lastChild);
    Object.assign(style, { height: `${least - MARGINS - PADDING}px`, overflow: "hidden", flex: "none" });
  }
  document.body.append(copy);
  shown.tall = Math.min(copy.offsetHeight, MOST) + MARGINS;
  copy.remove();
}

/**
 * Show an error in the place of what a node's panel shows.
 * @param {any} node
 * @param {string} text nothing takes the error away
 * @param {boolean} [ran] there was a new run: the result of the one before does not come back
 */
export function showError(node, text, ran = false) {
  const shown = panels.get(node);
  if (!shown || (!text && shown.alert.hidden)) return;
  const stays = shown.beside();
  shown.alert.hidden = !text;
  shown.alert.replaceChildren(...(text ? [toned({ text, tone: "bad" })] : []));
  shown.root.replaceChildren(shown.alert, shown.note, ...(text && !stays ? [] : [shown.content]));
  if (ran && !stays) shown.content.replaceChildren(shown.idle);
  grow(node);
}

/** A remark above what a node's panel shows; nothing takes it away. @param {any} node @param {string} text */
export function showNote(node, text) {
  const shown = panels.get(node);
  if (!shown || shown.note.textContent === text) return;
  shown.note.textContent = text;
  shown.note.hidden = !text;
  grow(node);
}

/** The widget of that name. */
export const widget = (/** @type {any} */ node, /** @type {string} */ name) =>
  node.widgets?.find((one) => one.name === name);

/** Call `then` after each call of a method that somebody else may have set. */
export function after(/** @type {any} */ object, /** @type {string} */ method, /** @type {() => void} */ then) {
  const usual = object[method];
  object[method] = function (...values) {
    const result = usual?.apply(this, values);
    then();
    return result;
  };
}

/** The node that an id from the server means; inside subgraphs ids are paths such as "12:3". */
export function findNode(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

/**
 * Call `show` with each node of these kinds that has run, and what it has for the page.
 * @param {string[]} kinds
 * @param {(node: any, output: Record<string, any>) => void} show
 */
export function onExecuted(kinds, show) {
  api.addEventListener("executed", ({ detail }) => {
    const node = findNode(detail.display_node ?? detail.node);
    if (kinds.includes(node?.comfyClass)) show(node, detail.output ?? {});
  });
}
