// @ts-check
// Keeps what our nodes report (the saved path, who was given which group) on the node, after the run too.
// Nodes that train have a chart in place of it: training_chart.js.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { findNode, panel } from "./panel.js";

const NODES = new Set(["SafeRegionBalance", "SafeRegionPromptPairs", "SaveSafeRegion"]);

app.registerExtension({
  name: "safe_region.status",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const text = detail.output?.text;
      const node = text && findNode(detail.display_node ?? detail.node);
      if (!node || !NODES.has(node.comfyClass)) return;
      panel(node, "safe_region_status").textContent = [text].flat().join("\n");
      node.setDirtyCanvas?.(true, true);
    });
  },
});
