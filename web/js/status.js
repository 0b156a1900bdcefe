// @ts-check
// Keeps what our nodes report (the saved path, who was given which group, what was moved) on the node, after the run too.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { findNode, grow, onExecuted, panel, toned } from "./panel.js";

const NODES = [
  "SafeRegionBalance", "SafeRegionCombine", "SafeRegionConditioning", "SafeRegionDemoModel", "SafeRegionGuardModel",
  "SafeRegionGuardReport", "SafeRegionPromptPairs", "SaveSafeRegion",
];

/**
 * What nodes/common.py `status` made, as verdicts.
 * @param {{ text: string | string[], safe_region_tone?: string[], heading?: string }} said
 */
function lines({ text, safe_region_tone: tones, heading }) {
  const first = heading ? `${heading} ` : "";
  return [text].flat().map((line, i) => ({ text: i ? line : first + line, tone: tones?.[i] }));
}

/**
 * What a guard did so far, or else what the node said when it ran.
 * @param {any} output
 */
const said = (output) => (output.safe_region_guard ?? [output]).flatMap(lines);

/** @param {any} node @param {import("./panel.js").Verdict[]} verdicts */
function show(node, verdicts) {
  panel(node, "safe_region_status").replaceChildren(...verdicts.map(toned));
  grow(node);
}

let ready = false; // the page has its graph
// not in `setup`: of a message that comes before, while a page loads in the midst of a run, ComfyUI would complain
api.addEventListener("safe_region.status", ({ detail }) => {
  const node = ready && findNode(detail.node);
  if (NODES.includes(node?.comfyClass)) show(node, lines(detail));
});

app.registerExtension({
  name: "safe_region.status",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) panel(node, "safe_region_status");
  },
  setup() {
    ready = true;
    onExecuted(NODES, (node, output) => output.text && show(node, said(output)));
  },
});
