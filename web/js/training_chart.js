// @ts-check
// The chart on nodes that train: the verdict, the loss, the walls, pictures before and after. It stays when the run is over.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { element, findNode, grow, onExecuted, panel, toned } from "./panel.js";
import { t } from "./texts.js";

/**
 * What nodes/train.py sends, each time all of it, but for the picture.
 * @typedef {{
 *   node: string, state: "running" | "done" | "stopped", stage: string, line: string, plan?: string, words: string,
 *   measure: string,
 *   count: number, losses: (number | null)[], separation: Separation | null, picture?: string, verdict?: Verdict
 * }} Detail
 * @typedef {import("./panel.js").Verdict} Verdict
 * @typedef {{
 *   names: [string, string], low: number, high: number, counts: [number[], number[]], outside: [number, number]
 * }} Separation
 * @typedef {{
 *   verdict: HTMLElement, line: HTMLElement, plan: HTMLElement, status: HTMLElement, plots: HTMLElement,
 *   picture: HTMLImageElement, figure: HTMLElement, told: number, stage: string, stopped: number
 * }} Chart
 */

const NODES = ["TrainBalanceRegion", "TrainSafeRegion"];
const TELL_EVERY = 10_000; // milliseconds, to screen readers
// of the two kinds of prompts: neither means good or bad
const HARMLESS = "#3b8ed0";
const UNSAFE = "#a86fd6";
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

/** A plot that says above it what it shows, with the ends of its axes beside and below it, and more words below. */
function plot(
  /** @type {string} */ title, /** @type {Node[]} */ shapes,
  /** @type {{ up?: string[], along?: string[] }} */ { up = [], along = [] }, /** @type {(Node | string)[]} */ ...below
) {
  const frame = shape("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none" }, ...shapes);
  Object.assign(frame.style, {
    flex: "1", minWidth: "0", height: `${HIGH}px`, border: "1px solid var(--border-color)", borderRadius: "3px",
    boxSizing: "border-box",
  });
  const ends = (/** @type {string[]} */ texts, /** @type {string} */ flexDirection) => element("div", {
    style: { display: "flex", flexDirection, justifyContent: "space-between", gap: "4px", color: "var(--descrip-text)" },
  }, ...texts.map((text) => element("span", { textContent: text })));
  const beside = ends(up, "column");
  Object.assign(beside.style, { textAlign: "right", whiteSpace: "nowrap" });
  return element(
    "div", { style: { display: "flex", flexDirection: "column", minWidth: "0", gap: "2px", fontSize: "11px" } },
    element("div", { textContent: title }), element("div", { style: { display: "flex", gap: "4px" } }, beside, frame),
    ends(along, "row"), ...below.map((words) => element("div", {}, words)),
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
  const title = detail.measure || t("loss");
  if (!losses.length) return plot(title, [], {});
  return plot(
    title, [line(losses, "var(--border-color)", 1), line(means, "var(--input-text)", 2)],
    { up: [high.toPrecision(2), "0"], along: [t("step {number}", { number: 1 }), String(detail.count)] },
    t("{loss} after {count} steps", { loss: means[means.length - 1].toPrecision(3), count: detail.count }),
  );
}

/** Harmless prompts above the middle, unsafe ones below it, and the wall between inside and outside. */
function walls(/** @type {Separation | null} */ found) {
  const title = t("prompts by their distance from the wall");
  if (!found) return plot(title, [], {});
  const wide = WIDE / found.counts[0].length;
  const most = found.counts.map((counts) => Math.max(1, ...counts));
  const bars = found.counts.flatMap((counts, side) => counts.map((count, i) => {
    const height = ((HIGH / 2 - 3) * count) / most[side];
    const y = side ? HIGH / 2 : HIGH / 2 - height;
    return shape("rect", { x: i * wide, y, width: wide * 0.85, height, fill: side ? UNSAFE : HARMLESS });
  }));
  const at = (WIDE * -found.low) / (found.high - found.low);
  const wall = shape("line", { x1: at, x2: at, y1: 0, y2: HIGH, stroke: "var(--input-text)", "stroke-width": 1.5 });
  const shares = found.names.map((name, i) => element("div", {},
    element("span", { style: { display: "inline-block", width: "8px", height: "8px", marginRight: "4px",
      background: i ? UNSAFE : HARMLESS } }),
    t("{name}: {share} % outside", { name, share: (100 * found.outside[i]).toFixed(1) })));
  return plot(
    title, [...bars, wall], {
      up: [String(most[0]), "0", String(most[1])],
      along: [
        t("inside {depth}", { depth: found.low.toFixed(1) }), t("outside {depth}", { depth: `+${found.high.toFixed(1)}` }),
      ],
    }, ...shares,
  );
}

let runs = 0; // that were started while the page is open

const content = (/** @type {any} */ node) => {
  const made = panel(node, "safe_region_training", {
    role: "group", label: t("Training"), idle: t("While it learns, you see here how it goes."),
    beside: () => charts.get(made)?.stopped === runs, // how far the very run came that failed
  });
  return made;
};

/** @param {any} node */
function chartOf(node) {
  const root = content(node);
  const known = charts.get(root);
  if (known && root.contains(known.line)) return known;
  const quiet = { position: "absolute", width: "1px", height: "1px", overflow: "hidden", clipPath: "inset(50%)" };
  const picture = /** @type {HTMLImageElement} */ (element("img", {
    alt: t("Pictures without the region, and below them the same with it"), style: { width: "100%", display: "block" },
    onload: () => {
      const ratio = `${picture.naturalWidth} / ${picture.naturalHeight}`;
      if (picture.style.aspectRatio === ratio) return;
      picture.style.aspectRatio = ratio;
      grow(node);
    },
  }));
  const chart = {
    verdict: element("div"),
    line: element("div"),
    plan: element("div", { style: { fontSize: "11px", color: "var(--descrip-text)" } }),
    status: element("div", { role: "status", style: quiet }),
    plots: element("div", {
      role: "img", "aria-label": "", style: {
        display: "none", gridTemplateColumns: "repeat(auto-fit, minmax(min(100%, 150px), 1fr))", gap: "8px", flexShrink: "0",
      },
    }),
    figure: element(
      "figure", { style: { display: "none", margin: "0" } }, picture,
      element("figcaption", { style: { fontSize: "11px", color: "var(--descrip-text)" } },
        t("above: without the region, below: with what is learned by now")),
    ),
    picture, told: -Infinity, stage: "", stopped: -1,
  };
  Object.assign(root.style, { display: "flex", flexDirection: "column", gap: "6px", position: "relative" });
  root.replaceChildren(chart.verdict, chart.line, chart.plan, chart.status, chart.plots, chart.figure);
  charts.set(root, chart);
  return chart;
}

/** @param {any} node @param {Chart} chart @param {string} line @param {Verdict | undefined} verdict */
function say(node, chart, line, verdict, plan = "") {
  chart.verdict.replaceChildren(...(verdict?.text ? [toned(verdict)] : []));
  chart.line.textContent = line;
  chart.plan.textContent = plan;
  grow(node);
}

/** @param {Detail} detail */
function show(detail) {
  const node = findNode(detail.node);
  if (!node || !NODES.includes(node.comfyClass)) return;
  const chart = chartOf(node);
  chart.stopped = detail.state === "stopped" ? runs : -1;
  const now = performance.now();
  if (now - chart.told > TELL_EVERY || detail.stage !== chart.stage || detail.state !== "running") {
    Object.assign(chart, { told: now, stage: detail.stage });
    chart.status.textContent = [detail.verdict?.text, detail.line].filter(Boolean).join("\n");
  }
  const plots = detail.losses.length > 1 || detail.separation;
  chart.plots.style.display = plots ? "grid" : "none";
  if (plots) chart.plots.replaceChildren(curve(detail), walls(detail.separation));
  chart.plots.setAttribute("aria-label", detail.words);
  if (detail.picture) chart.picture.src = `data:image/jpeg;base64,${detail.picture}`;
  const seen = detail.picture === undefined ? chart.picture.src : detail.picture;
  chart.figure.style.display = seen && detail.state !== "done" ? "block" : "none"; // the report has more of them
  say(node, chart, detail.line, detail.verdict, detail.state === "running" ? detail.plan : "");
}

let ready = false; // the page has its graph
// not in `setup`: of a message that comes before, while a page loads in the midst of a run, ComfyUI would complain
api.addEventListener("safe_region.training", ({ detail }) => ready && show(detail));

app.registerExtension({
  name: "safe_region.training_chart",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) content(node);
  },
  setup() {
    ready = true;
    api.addEventListener("execution_start", () => runs++);
    // a run that was taken from the cache has no chart, but its summary
    onExecuted(NODES, (node, { text, safe_region_verdict: verdicts }) => {
      if (text) say(node, chartOf(node), [text].flat().join("\n"), verdicts?.[0]);
    });
  },
});
