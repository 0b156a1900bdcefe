// @ts-check
// The heat strip on "Inspect Safe Region": the prompt's words by how far each lies outside, and how far it was moved.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element, findNode, grow, onExecuted, panel } from "./panel.js";
import { t } from "./texts.js";

const NODE = "SafeRegionInspect";
const KEY = "safe_region_strip";
const ARROW = 36; // pixels of an arrow that moves a token by its own length
const SAFE = "#2f9e6e";
const UNSAFE = "#d1495b";
const GROUND = "var(--comfy-input-bg)";
const QUIET = "var(--descrip-text)";

/**
 * @typedef {{ text: string, kind: string, depth: number | null, after: number | null, shift: number, part: string,
 *   wall: number, heat: number }} Item
 * @typedef {{ filename: string, subfolder: string, type: string, caption: string }} Picture
 * @typedef {{ region: string, verdict: string, inside: boolean, moved: boolean, safe: boolean, lines: string[],
 *   items: Item[], left_out: number, pictures?: Picture[] }} Strip
 */

/** The ground of a word: neutral where no wall looks, green inside, redder the further outside. */
function ground({ depth, heat }) {
  if (depth == null) return GROUND;
  const [colour, share] = depth > 0 ? [UNSAFE, 12 + 73 * heat] : [SAFE, 22];
  return `color-mix(in srgb, ${colour} ${Math.round(share)}%, ${GROUND})`;
}

const signed = (/** @type {number} */ value) => `${value > 0 ? "+" : ""}${value.toFixed(1)}`;

/** What hovering, focus and screen readers say about a word. */
function explained(/** @type {Item} */ item) {
  const said = [];
  if (item.depth == null) said.push(t("no wall looks at it"));
  else {
    const distance = Math.abs(item.depth).toFixed(1);
    const wall = item.part ? t("wall {wall} of {part}", item) : t("the nearest wall");
    said.push(item.depth > 0 ? t("outside, {distance} beyond {wall}", { distance, wall })
      : t("inside, {distance} before {wall}", { distance, wall }));
    if (item.shift && item.after != null) said.push(t("afterwards {depth}", { depth: signed(item.after) }));
  }
  const share = Math.round(item.shift * 100);
  said.push(item.shift ? t("moved by {share} % of its length", { share }) : t("not moved"));
  return `${item.text}: ${said.join("; ")}`;
}

function arrow(/** @type {number} */ shift) {
  const length = Math.round(ARROW * Math.min(shift, 2));
  const line = element("span", { style: { display: "inline-block", width: `${length}px`, height: "2px",
    background: "currentColor", verticalAlign: "middle" } });
  const head = element("span", { style: { display: "inline-block", borderLeft: "5px solid currentColor",
    borderTop: "4px solid transparent", borderBottom: "4px solid transparent", verticalAlign: "middle" } });
  return length < 2 ? null : element("span", { "aria-hidden": "true" }, line, head);
}

function word(/** @type {Item} */ item, /** @type {boolean} */ quiet) {
  const outside = item.depth != null && item.depth > 0;
  const text = element("span", {
    style: {
      padding: "2px 6px", borderRadius: "4px", background: ground(item), whiteSpace: "pre-wrap",
      border: `1px solid ${outside ? UNSAFE : "transparent"}`,
      fontStyle: item.kind === "word" ? "normal" : "italic",
    },
  }, item.text);
  const below = element("span", { "aria-hidden": "true", style: { fontSize: "10px", minHeight: "12px" } },
    outside ? signed(/** @type {number} */ (item.depth)) : "");
  const moved = element("span", { style: { height: "10px", lineHeight: "10px" } }, arrow(item.shift));
  const more = quiet ? [] : [below, moved];
  return element("button", {
    type: "button", title: explained(item), tabIndex: -1, "aria-label": explained(item),
    style: {
      display: "inline-flex", flexDirection: "column", alignItems: "flex-start", background: "none", border: "none",
      padding: "1px", margin: "0", font: "inherit", color: "inherit", cursor: "default", maxWidth: "100%",
      textAlign: "left", overflowWrap: "anywhere",
    },
  }, text, ...more);
}

/** The words in a row, of which one is in the tab order; arrow keys go on to the others. */
function wordRow(/** @type {Item[]} */ items, /** @type {HTMLElement} */ details) {
  const quiet = items.every((item) => !item.shift && !item.heat); // no numbers and arrows to make room for
  const buttons = items.map((item) => word(item, quiet));
  const row = element("div", {
    role: "toolbar", "aria-label": t("The prompt's words"),
    style: { display: "flex", flexWrap: "wrap", gap: "2px 4px", alignItems: "flex-start", margin: "6px 0" },
  }, ...buttons);
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  buttons.forEach((button, index) => {
    const say = () => (details.textContent = explained(items[index]));
    button.addEventListener("mouseenter", say);
    button.addEventListener("focus", () => {
      for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
      say();
    });
    button.addEventListener("keydown", (event) => {
      const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : index + (steps[event.key] ?? 0);
      if (to === index || !buttons[to]) return;
      event.preventDefault();
      event.stopPropagation();
      buttons[to].focus();
    });
  });
  const hottest = items.reduce((best, item, index) => (item.heat > items[best].heat ? index : best), 0);
  if (buttons.length) buttons[hottest].tabIndex = 0;
  return row;
}

function legend() {
  const swatch = (/** @type {number} */ depth, /** @type {number} */ heat, /** @type {string} */ text) => element("span",
    {}, element("span", { style: { display: "inline-block", width: "12px", height: "10px", borderRadius: "2px",
      marginRight: "4px", background: ground({ depth, heat }) } }), text);
  return element("div", { style: { display: "flex", flexWrap: "wrap", gap: "2px 12px", fontSize: "10px", color: QUIET } },
    swatch(-1, 0, t("inside")), swatch(1, 0.1, t("just outside")), swatch(1, 1, t("far outside")),
    element("span", {}, arrow(0.5), ` ${t("how far it was moved")}`),
    element("span", {}, t("numbers: how far beyond the wall; from 1 the gate is fully open")));
}

function pictures(/** @type {Picture[]} */ found) {
  const shown = found.map(({ filename, subfolder, type, caption }) => element("figure", { style: { margin: "0" } },
    element("img", {
      src: api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`), alt: t("The prompt drawn: {caption}", { caption }),
      style: { width: "112px", height: "112px", borderRadius: "4px", display: "block" },
    }),
    element("figcaption", { style: { fontSize: "10px", color: QUIET } }, caption)));
  return element("div", { style: { display: "flex", gap: "8px", marginTop: "6px" } }, ...shown);
}

function stripElement(/** @type {Strip} */ strip) {
  const details = element("div", { style: { minHeight: "17px", fontSize: "11px", color: QUIET } });
  const colour = strip.safe ? SAFE : UNSAFE;
  const verdict = element("div", { role: "status",
    style: { fontWeight: "600", borderLeft: `3px solid ${colour}`, paddingLeft: "6px" } }, strip.verdict);
  const lines = strip.lines.map((line) => element("div", { style: { fontSize: "11px" } }, line));
  if (strip.left_out) lines.push(element("div", { style: { fontSize: "11px" } }, t("and {count} more words", { count: strip.left_out })));
  return element("section", { "aria-label": t("Safe region {region}", strip) }, verdict, ...lines,
    wordRow(strip.items, details), details, legend(), strip.pictures?.length ? pictures(strip.pictures) : null);
}

const panelOf = (/** @type {any} */ node) => panel(node, "safe_region_strip", {
  role: "group", label: t("What the region does to the prompt"),
  height: (made) => (made.querySelector("img") ? 340 : made.querySelector("section") ? 200 : 32),
});

/** @param {any} node @param {Strip[] | undefined} strips */
function show(node, strips) {
  if (!node || node.comfyClass !== NODE || !Array.isArray(strips)) return;
  panelOf(node).replaceChildren(...strips.map(stripElement));
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
    if (node.comfyClass === NODE) panelOf(node).textContent = t("After a run, you see here what the region does to the prompt.");
  },
  setup() {
    onExecuted([NODE], (node, output) => show(node, output[KEY]));
  },
  afterConfigureGraph() {
    if (app.rootGraph.nodes.some((node) => node.comfyClass === NODE)) showKnown();
  },
});
