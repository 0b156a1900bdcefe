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
 * The element below a node's widgets that has this name; made when it is first asked for. Its content is the caller's.
 * Ask for it in `nodeCreated`: Nodes 2.0 of frontend 1.32 may not see a widget that comes later to a node with links.
 * @param {any} node
 * @param {string} name unique among the node's widgets
 * @param {{ height?: number | ((made: HTMLElement) => number), role?: string, label?: string }} [options]
 *   `height` is the least one, in pixels, of the element as it is; `grow` applies one that has changed
 * @returns {HTMLElement}
 */
export function panel(node, name, { height = 56, role = "status", label } = {}) {
  const known = node.widgets?.find((widget) => widget.name === name);
  if (known) return known.element;
  const made = element("div", {
    role, ...(label ? { "aria-label": label } : {}),
    style: {
      boxSizing: "border-box", height: "100%", overflow: "auto", padding: "4px 8px", whiteSpace: "pre-wrap",
      overflowWrap: "anywhere", font: "12px/1.4 sans-serif", color: "var(--input-text)",
      background: "var(--comfy-input-bg)", borderRadius: "4px", userSelect: "text",
    },
  });
  const widget = node.addDOMWidget(name, name, made, {
    serialize: false, getMinHeight: () => (typeof height === "function" ? height(made) : height),
  });
  widget.serialize = false;
  grow(node);
  return made;
}

/** Make a node as large as its widgets need; never smaller than it is. */
export function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas?.(true, true);
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
