// @ts-check
// A node that trains is added with a fixed seed: else it would learn anew at every Run. What a workflow saved wins.
import { app } from "../../../scripts/app.js";

const NODES = ["TrainBalanceRegion", "TrainSafeRegion"];

app.registerExtension({
  name: "safe_region.fresh_seed",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const seed = node.widgets.find((widget) => widget.name === "seed");
    for (const control of seed?.linkedWidgets ?? []) control.value = "fixed";
  },
});
