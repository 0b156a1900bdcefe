// Keeps what our nodes report (the saved path, a region's card, how training ended) on the node, after the run too.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NAME = "safe_region_status";
const NODES = new Set([
  "SafeRegionBalance", "SafeRegionLoader", "SafeRegionPromptPairs", "SaveSafeRegion", "TrainBalanceRegion",
  "TrainSafeRegion",
]);

/** The element below a node's widgets that holds its text; made when it is first needed. */
function statusElement(node) {
  const known = node.widgets?.find((widget) => widget.name === NAME);
  if (known) return known.element;
  const element = document.createElement("div");
  element.setAttribute("role", "status");
  Object.assign(element.style, {
    boxSizing: "border-box", height: "100%", overflow: "auto", padding: "4px 8px", whiteSpace: "pre-wrap",
    overflowWrap: "anywhere", font: "12px/1.4 sans-serif", color: "var(--input-text)",
    background: "var(--comfy-input-bg)", borderRadius: "4px", userSelect: "text",
  });
  const widget = node.addDOMWidget(NAME, NAME, element, { serialize: false, getMinHeight: () => 56 });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return element;
}

/** The node that an id from the server means; inside subgraphs ids are paths such as "12:3". */
function findNode(id) {
  let graph = app.rootGraph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "safe_region.status",
  setup() {
    api.addEventListener("executed", ({ detail }) => {
      const text = detail.output?.text;
      const node = text && findNode(detail.display_node ?? detail.node);
      if (!node || !NODES.has(node.comfyClass)) return;
      statusElement(node).textContent = [text].flat().join("\n"); // as text: it may come from a stranger's file
      node.setDirtyCanvas?.(true, true);
    });
  },
});
