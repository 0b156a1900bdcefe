// @ts-check
// Keeps what our nodes report (the saved path, who was given which group) on the node, after the run too.
import { app } from "../../../scripts/app.js";
import { grow, onExecuted, panel } from "./panel.js";

const NODES = ["SafeRegionBalance", "SafeRegionPromptPairs", "SaveSafeRegion"];

/** The node's panel; it takes no room before there is a text. */
const status = (/** @type {any} */ node) =>
  panel(node, "safe_region_status", { height: (made) => (made.textContent ? 56 : 0) });

app.registerExtension({
  name: "safe_region.status",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) status(node).hidden = true;
  },
  setup() {
    onExecuted(NODES, (node, { text }) => {
      if (!text) return;
      const shown = status(node);
      shown.textContent = [text].flat().join("\n");
      shown.hidden = false;
      grow(node);
    });
  },
});
