// @ts-check
// The chart on nodes that train: the loss, the walls, pictures before and after. It stays when the run is over.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element, findNode, grow, onExecuted, panel } from "./panel.js";
import { t } from "./texts.js";

/**
 * What nodes/train.py sends, each time all of it, but for the picture.
 * @typedef {{
 *   node: string, state: "running" | "done" | "stopped", stage: string, line: string, words: string, measure: string,
 *   count: number, losses: (number | null)[], separation: Separation | null, picture?: string
 * }} Detail
 * @typedef {{
 *   names: [string, string], low: number, high: number, counts: [number[], number[]], outside: [number, number]
 * }} Separation
 * @typedef {{
 *   line: HTMLElement, status: HTMLElement, plots: HTMLElement, picture: HTMLImageElement, figure: HTMLElement,
 *   told: number, stage: string, tall: number
 * }} Chart
 */

const NODES = ["TrainBalanceRegion", "TrainSafeRegion"];
const TELL_EVERY = 10_000; // milliseconds, to screen readers
const SAFE = "var(--p-green-500, #22a065)";
const UNSAFE = "var(--error-text, #d1495b)";
const [WIDE, HIGH] = [200, 80]; // of a plot's own coordinates; it is stretched to its place

/** @type {WeakMap<HTMLElement, Chart>} */
const charts = new WeakMap();

/** An SVG element; a line keeps its width however the plot is stretched. */
function shape(/** @type {string} */ tag, /** @type {Record<string, any>} */ attributes, /** @type {Node[]} */ ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries({ "vector-effect": "non-scaling-stroke", ...attributes }))
    made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** Running means over a fortieth of the values. */
function smooth(/** @type {number[]} */ values) {
  const size = Math.max(1, Math.floor(values.length / 40));
  return values.map((_, i) => {
    const some = values.slice(Math.max(0, i - size), i + 1);
    return some.reduce((sum, value) => sum + value, 0) / some.length;
  });
}

/** A plot with a line of text above it and one below. */
function plot(/** @type {string} */ above, /** @type {string} */ below, /** @type {Node[]} */ shapes, colours = ["", ""]) {
  const words = (/** @type {string} */ text, /** @type {string} */ color) => element("div", {
    title: text, style: { overflow: "hidden", textOverflow: "ellipsis", whiteSpace: "nowrap", fontSize: "11px", color },
  }, text);
  const frame = shape("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", width: "100%" }, ...shapes);
  Object.assign(frame.style, {
    height: "80px", display: "block", border: "1px solid var(--border-color)", borderRadius: "3px",
    boxSizing: "border-box",
  });
  return element(
    "div", { style: { display: "flex", flexDirection: "column", minWidth: "0", gap: "2px" } },
    words(above, colours[0]), frame, words(below, colours[1]),
  );
}

function curve(/** @type {Detail} */ detail) {
  const losses = /** @type {number[]} */ (detail.losses.filter((loss) => loss != null));
  const means = smooth(losses);
  const high = Math.max(...(losses.length < 40 ? losses : means), 1e-9) / 0.95;
  const points = (/** @type {number[]} */ values) =>
    values.map((value, i) => `${(i / Math.max(1, values.length - 1)) * WIDE},${Math.max(0, HIGH * (1 - value / high))}`)
      .join(" ");
  const line = (/** @type {number[]} */ values, /** @type {string} */ stroke, /** @type {number} */ width) =>
    shape("polyline", { points: points(values), fill: "none", stroke, "stroke-width": width });
  const last = losses.length
    ? t("{loss} after {count} steps", { loss: means[means.length - 1].toPrecision(3), count: detail.count }) : "";
  return plot(
    detail.measure || t("loss"), last, [line(losses, "var(--border-color)", 1), line(means, "var(--input-text)", 2)],
  );
}

/** Harmless prompts above the middle, unsafe ones below it, and the wall between inside and outside. */
function walls(/** @type {Separation | null} */ found) {
  if (!found) return plot(t("walls"), "", []);
  const wide = WIDE / found.counts[0].length;
  const bars = found.counts.flatMap((counts, side) => {
    const most = Math.max(1, ...counts);
    return counts.map((count, i) => {
      const height = ((HIGH / 2 - 3) * count) / most;
      const y = side ? HIGH / 2 : HIGH / 2 - height;
      return shape("rect", { x: i * wide, y, width: wide * 0.85, height, fill: side ? UNSAFE : SAFE });
    });
  });
  const at = (WIDE * -found.low) / (found.high - found.low);
  const wall = shape("line", { x1: at, x2: at, y1: 0, y2: HIGH, stroke: "var(--input-text)", "stroke-width": 1.5 });
  const [above, below] = found.names.map((name, i) =>
    t("{name}: {share} % outside", { name, share: (100 * found.outside[i]).toFixed(1) }));
  return plot(above, below, [...bars, wall], [SAFE, UNSAFE]);
}

/** @param {any} node */
function chartOf(node) {
  const root = panel(node, "safe_region_training", {
    role: "group", label: t("Training"), height: (made) => charts.get(made)?.tall ?? 32,
  });
  const known = charts.get(root);
  if (known) return known;
  const quiet = { position: "absolute", width: "1px", height: "1px", overflow: "hidden", clipPath: "inset(50%)" };
  const picture = /** @type {HTMLImageElement} */ (element("img", {
    alt: t("Pictures without the region, and below them the same with it"), style: { width: "100%", display: "block" },
  }));
  const chart = {
    line: element("div"),
    status: element("div", { role: "status", style: quiet }),
    plots: element("div", {
      role: "img", "aria-label": "", style: { display: "none", gridTemplateColumns: "1fr 1fr", gap: "8px", flexShrink: "0" },
    }),
    figure: element(
      "figure", { style: { display: "none", margin: "0" } }, picture,
      element("figcaption", { style: { fontSize: "11px", color: "var(--descrip-text)" } },
        t("above: without the region, below: with what is learned by now")),
    ),
    picture, told: -Infinity, stage: "", tall: 32,
  };
  Object.assign(root.style, { display: "flex", flexDirection: "column", gap: "6px", position: "relative" });
  root.append(chart.line, chart.status, chart.plots, chart.figure);
  charts.set(root, chart);
  return chart;
}

/** Give the panel the height that its content needs. */
function fit(/** @type {any} */ node, /** @type {Chart} */ chart) {
  const lines = chart.line.textContent?.split("\n").length ?? 1;
  const seen = (/** @type {HTMLElement} */ part) => part.style.display !== "none";
  const tall = 20 + 17 * Math.max(lines, 2) + (seen(chart.plots) ? 132 : 0) + (seen(chart.figure) ? 190 : 0);
  if (tall === chart.tall) return;
  chart.tall = tall;
  grow(node);
}

/** @param {Detail} detail */
function show(detail) {
  const node = findNode(detail.node);
  if (!node || !NODES.includes(node.comfyClass)) return;
  const chart = chartOf(node);
  chart.line.textContent = detail.line;
  const now = performance.now();
  if (now - chart.told > TELL_EVERY || detail.stage !== chart.stage || detail.state !== "running") {
    Object.assign(chart, { told: now, stage: detail.stage });
    chart.status.textContent = detail.line;
  }
  const plots = detail.losses.length > 1 || detail.separation;
  chart.plots.style.display = plots ? "grid" : "none";
  if (plots) chart.plots.replaceChildren(curve(detail), walls(detail.separation));
  chart.plots.setAttribute("aria-label", detail.words);
  if (detail.picture) chart.picture.src = `data:image/jpeg;base64,${detail.picture}`;
  const seen = detail.picture === undefined ? chart.picture.src : detail.picture;
  chart.figure.style.display = seen && detail.state !== "done" ? "block" : "none"; // the report has more of them
  fit(node, chart);
}

let ready = false; // the page has its graph
// not in `setup`: of a message that comes before, while a page loads in the midst of a run, ComfyUI would complain
api.addEventListener("safe_region.training", ({ detail }) => ready && show(detail));

app.registerExtension({
  name: "safe_region.training_chart",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) chartOf(node).line.textContent = t("While it learns, you see here how it goes.");
  },
  setup() {
    ready = true;
    // a run that was taken from the cache has no chart, but its summary
    onExecuted(NODES, (node, { text }) => {
      if (!text) return;
      const chart = chartOf(node);
      chart.line.textContent = chart.status.textContent = [text].flat().join("\n");
      fit(node, chart);
    });
  },
});
