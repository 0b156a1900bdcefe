// @ts-check
// The heat strip on "Inspect Safe Region": what the region does to the prompt, and its words by how far each lies outside.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element, findNode, grow, onExecuted, panel, toned } from "./panel.js";
import { t } from "./texts.js";

const NODE = "SafeRegionInspect";
const KEY = "safe_region_strip";
const ARROW = 36; // pixels of an arrow that moves a token by its own length
const SAFE = "#2f9e6e";
const UNSAFE = "#d1495b";
const GROUND = "var(--comfy-input-bg)";
const SMALL = { fontSize: "11px" };
const TALLEST = 220; // pixels of a prompt's words; what is longer scrolls
const RIGHT_TO_LEFT = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/u;

/**
 * @typedef {{ text: string, kind: string, depth: number | null, after: number | null, shift: number, part: string,
 *   wall: number, heat: number, unknown: boolean }} Item
 * @typedef {{ text: string, values: Record<string, string> }} Said
 * @typedef {{ filename: string, subfolder: string, type: string, caption: string }} Picture
 * @typedef {{ region: string, clauses: Said[], notes: Said[], tone: "good" | "warn" | "bad", lines: string[],
 *   items: Item[], folds: [number, number][], left_out: number, pictures?: Picture[] }} Strip
 */

/** A sentence from the server in the page's language. */
const said = (/** @type {Said} */ { text, values }) => t(text, { ...values, place: t(values.place ?? "", values) });

/** The ground of a word: neutral where no wall looks, green inside, redder the further outside. */
function ground({ depth, heat }) {
  if (depth == null) return GROUND;
  const [colour, share] = depth > 0 ? [UNSAFE, 20 + 35 * heat] : [SAFE, 22];
  return `color-mix(in srgb, ${colour} ${Math.round(share)}%, ${GROUND})`;
}

const signed = (/** @type {number} */ value) => `${value > 0 ? "+" : ""}${value.toFixed(1)}`;

function state(/** @type {number | null} */ depth) {
  if (depth == null) return t("no wall looks at it");
  return depth <= 0 ? t("inside") : depth < 1 ? t("just outside") : t("far outside");
}

/** What hovering, focus and screen readers say about a word; its numbers come last. */
function explained(/** @type {Item} */ item) {
  const told = [state(item.depth)];
  if (item.unknown) told.unshift(t("the model does not know this word"));
  if (item.depth != null && item.shift && item.after != null) told.push(t("afterwards {state}", { state: state(item.after) }));
  told.push(item.shift ? t("moved by {share} % of its length", { share: Math.round(item.shift * 100) }) : t("not moved"));
  if (item.depth != null) {
    const wall = item.part ? t("wall {wall} of {part}", item) : t("the nearest wall");
    const values = { distance: Math.abs(item.depth).toFixed(1), wall };
    const numbers = [item.depth > 0 ? t("{distance} beyond {wall}", values) : t("{distance} before {wall}", values)];
    if (item.shift && item.after != null) numbers.push(t("afterwards {state}", { state: signed(item.after) }));
    told.push(numbers.join(", "));
  }
  return `${item.text}: ${told.join("; ")}`;
}

function arrow(/** @type {number} */ shift) {
  const length = Math.round(ARROW * Math.min(shift, 2));
  const line = element("span", { style: { display: "inline-block", width: `${length}px`, height: "2px",
    background: "currentColor", verticalAlign: "middle" } });
  const head = element("span", { style: { display: "inline-block", borderLeft: "5px solid currentColor",
    borderTop: "4px solid transparent", borderBottom: "4px solid transparent", verticalAlign: "middle" } });
  return length < 2 ? null : element("span", { "aria-hidden": "true", dir: "ltr" }, line, head);
}

function word(/** @type {Item} */ item) {
  const outside = item.depth != null && item.depth > 0;
  const text = element("span", {
    style: {
      padding: "2px 6px", borderRadius: "4px", background: ground(item), whiteSpace: "pre-wrap",
      border: `1px solid ${outside ? UNSAFE : "transparent"}`, unicodeBidi: "isolate",
      fontStyle: item.kind === "word" ? "normal" : "italic",
      ...(item.unknown ? { textDecoration: "underline dotted", textUnderlineOffset: "3px" } : {}),
    },
  }, item.text);
  // without colour, the bar says it too
  const bar = outside && element("span", { "aria-hidden": "true", style: { height: "3px", marginTop: "1px",
    width: `${Math.round(100 * item.heat)}%`, background: UNSAFE, borderRadius: "2px" } });
  const number = outside && element("span", { "aria-hidden": "true", hidden: true, className: "number", style: { fontSize: "10px" } },
    signed(/** @type {number} */ (item.depth)));
  const moved = item.shift ? element("span", { style: { height: "10px", lineHeight: "10px" } }, arrow(item.shift)) : null;
  return element("button", {
    type: "button", tabIndex: -1, "aria-label": explained(item),
    style: {
      display: "inline-flex", flexDirection: "column", alignItems: "flex-start", background: "none", border: "none",
      padding: "1px", margin: "0", font: "inherit", color: "inherit", cursor: "default", maxWidth: "100%",
      textAlign: "start", overflowWrap: "anywhere",
    },
  }, text, ...[bar, number, moved].filter(Boolean));
}

/** A stretch of words inside as one button, which puts them in its place. */
function fold(/** @type {Item[]} */ hidden, /** @type {(button: HTMLElement) => void} */ open) {
  const count = hidden.length;
  const text = hidden.some((item) => item.depth != null) ? t("… {count} words inside …", { count }) : t("… {count} words …", { count });
  const button = element("button", {
    type: "button", tabIndex: -1, "aria-expanded": "false",
    style: { font: "inherit", fontSize: "11px", padding: "2px 8px", margin: "1px", borderRadius: "10px", color: "inherit",
      background: "none", border: "1px dashed currentColor", cursor: "pointer", alignSelf: "flex-start" },
  }, text);
  button.addEventListener("click", () => open(button));
  return button;
}

/** The words in a row, of which one is in the tab order; arrow keys go on to the others. */
function wordRow(/** @type {Strip} */ { items, folds }, /** @type {HTMLElement} */ details, /** @type {() => void} */ resized) {
  const row = element("div", {
    role: "toolbar", "aria-label": t("The prompt's words"),
    style: { display: "flex", flexWrap: "wrap", gap: "2px 4px", alignItems: "flex-start", alignContent: "flex-start",
      margin: "6px 0", maxHeight: `${TALLEST}px`, overflowY: "auto", flexShrink: "0" },
  });
  const own = items.filter((item) => item.kind === "word").map((item) => item.text).join(" ");
  if (RIGHT_TO_LEFT.test(own)) row.dir = "rtl";
  const only = (/** @type {HTMLElement} */ button) => {
    for (const other of /** @type {NodeListOf<HTMLElement>} */ (row.querySelectorAll("button"))) other.tabIndex = other === button ? 0 : -1;
  };
  const add = (/** @type {HTMLElement} */ button, /** @type {string} */ text) => {
    const say = () => (details.textContent = text);
    button.addEventListener("mouseenter", say);
    button.addEventListener("focus", () => {
      only(button);
      say();
    });
    return button;
  };
  const shown = (/** @type {Item} */ item) => add(word(item), explained(item));
  const ends = new Map(folds);
  for (let at = 0; at < items.length; at++) {
    const end = ends.get(at);
    if (end === undefined) row.append(shown(items[at]));
    else {
      const hidden = items.slice(at, end);
      row.append(add(fold(hidden, (button) => {
        const words = hidden.map(shown);
        button.replaceWith(...words);
        resized();
        words[0].focus();
      }), t("Press to see them.")));
      at = end - 1;
    }
  }
  const steps = row.dir === "rtl" ? { ArrowLeft: 1, ArrowDown: 1, ArrowRight: -1, ArrowUp: -1 }
    : { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  row.addEventListener("keydown", (event) => {
    const buttons = [...row.querySelectorAll("button")];
    const index = buttons.indexOf(/** @type {any} */ (document.activeElement));
    const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : index + (steps[event.key] ?? 0);
    if (to === index || !buttons[to]) return;
    event.preventDefault();
    event.stopPropagation();
    buttons[to].focus();
  });
  const hottest = items.reduce((best, item, index) => (item.heat > items[best].heat ? index : best), 0);
  const text = items[hottest] && explained(items[hottest]);
  const first = [...row.querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === text);
  if (row.firstChild) only(/** @type {HTMLElement} */ (first ?? row.firstChild));
  return row;
}

function legend(/** @type {boolean} */ unknown) {
  const swatch = (/** @type {number} */ depth, /** @type {number} */ heat, /** @type {string} */ text) => element("span",
    {}, element("span", { style: { display: "inline-block", width: "12px", height: "10px", borderRadius: "2px",
      marginInlineEnd: "4px", background: ground({ depth, heat }) } }), text);
  return element("div", { style: { display: "flex", flexWrap: "wrap", gap: "2px 12px", fontSize: "10px" } },
    swatch(-1, 0, t("inside")), swatch(1, 0.1, t("just outside")), swatch(1, 1, t("far outside")),
    element("span", {}, arrow(0.5), ` ${t("how far it was moved")}`),
    unknown ? element("span", { style: { textDecoration: "underline dotted" } }, t("the model does not know this word")) : null);
}

/** The numbers, folded away; while they are open each red word shows its own. */
function numbers(/** @type {Strip} */ { lines }, /** @type {HTMLElement} */ row, /** @type {() => void} */ resized) {
  const part = /** @type {HTMLDetailsElement} */ (element("details", { style: SMALL },
    element("summary", { style: { cursor: "pointer" } }, t("Numbers")),
    ...lines.map((line) => element("div", {}, line)),
    element("div", {}, t("numbers: how far beyond the wall; from 1 the gate is fully open"))));
  part.addEventListener("toggle", () => {
    for (const number of /** @type {NodeListOf<HTMLElement>} */ (row.querySelectorAll(".number"))) number.hidden = !part.open;
    resized();
  });
  return part;
}

function pictures(/** @type {Picture[]} */ found) {
  const shown = found.map(({ filename, subfolder, type, caption }) => element("figure", { style: { margin: "0" } },
    element("img", {
      src: api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`), alt: t("The prompt drawn: {caption}", { caption }),
      style: { width: "112px", height: "112px", borderRadius: "4px", display: "block" },
    }),
    element("figcaption", { style: { fontSize: "10px" } }, caption)));
  return element("div", { style: { display: "flex", gap: "8px", marginTop: "6px" } }, ...shown);
}

function stripElement(/** @type {Strip} */ strip, /** @type {() => void} */ resized) {
  // of one height, so that nothing moves while the pointer goes over the words
  const details = element("div", { style: { height: "32px", overflowY: "auto", fontSize: "11px", flexShrink: "0" } });
  const verdict = element("div", { role: "status" }, toned({ text: strip.clauses.map(said).join(" "), tone: strip.tone }));
  const notes = strip.notes.map((note) => element("div", { style: { ...SMALL, marginTop: "2px" } }, said(note)));
  if (strip.left_out) notes.push(element("div", { style: SMALL }, t("and {count} more words", { count: strip.left_out })));
  const row = wordRow(strip, details, resized);
  return element("section", { "aria-label": t("Safe region {region}", strip) }, verdict, ...notes, row, details,
    legend(strip.items.some((item) => item.unknown)), numbers(strip, row, resized),
    strip.pictures?.length ? pictures(strip.pictures) : null);
}

const panelOf = (/** @type {any} */ node) => panel(node, "safe_region_strip", {
  role: "group", label: t("What the region does to the prompt"),
  idle: t("After a run, you see here what the region does to the prompt."),
});

/** @param {any} node @param {Strip[] | undefined} strips */
function show(node, strips) {
  if (!node || node.comfyClass !== NODE || !Array.isArray(strips)) return;
  panelOf(node).replaceChildren(...strips.map((strip) => stripElement(strip, () => grow(node))));
  if (node.size[0] < 420) node.setSize([420, node.size[1]]);
  grow(node);
}

/** Show what the last run said. On coming back from another tab that is known again only a moment after the graph. */
function showKnown(tries = 25) {
  const known = Object.entries(app.nodeOutputs ?? {}).filter(([, output]) => output?.[KEY]);
  for (const [id, output] of known) show(findNode(id), output[KEY]);
  if (!known.length && tries) setTimeout(showKnown, 200, tries - 1);
}

app.registerExtension({
  name: "safe_region.inspect_strip",
  nodeCreated(node) {
    if (node.comfyClass === NODE) panelOf(node);
  },
  setup() {
    onExecuted([NODE], (node, output) => show(node, output[KEY]));
  },
  afterConfigureGraph() {
    if (app.rootGraph.nodes.some((node) => node.comfyClass === NODE)) showKnown();
  },
});
