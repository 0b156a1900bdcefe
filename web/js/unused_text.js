// @ts-check
// A text box that is not read, because a pack or a file is chosen, is dimmed, and the node says what is read instead.
import { app } from "../../../scripts/app.js";
import { after, element, showNote, widget } from "./panel.js";
import { t } from "./texts.js";

const NONE = "none";
/** @type {Record<string, string[]>} the choices that take the text box's place, the stronger first */
const INSTEAD = { SafeRegionPromptPairs: ["pack"], TrainBalanceRegion: ["pack", "file"] };
const MARK = "data-safe-region-unused";

/** Dim the text box or not. The classic canvas shows the widget's element, Nodes 2.0 one of its own. */
function dim(node, /** @type {boolean} */ unused) {
  const box = widget(node, "text")?.element;
  if (box) box.style.opacity = unused ? "0.4" : "";
  const mark = widget(node, "safe_region_status") ?? widget(node, "safe_region_training");
  mark?.element.toggleAttribute(MARK, unused);
}

function refresh(node) {
  const chosen = INSTEAD[node.comfyClass].find((name) => {
    const linked = node.inputs?.some((input) => input.widget?.name === name && input.link != null);
    return !linked && (widget(node, name)?.value ?? NONE) !== NONE;
  });
  dim(node, Boolean(chosen));
  const values = { name: String(chosen && widget(node, chosen).value) };
  showNote(node, !chosen ? "" : chosen === "pack" ? t("The text box is not used: the pack {name} is.", values)
    : t("The text box is not used: the file {name} is.", values));
}

app.registerExtension({
  name: "safe_region.unused_text",
  init() {
    document.head.append(element("style", {
      textContent: `[data-node-id]:has([${MARK}]) textarea { opacity: 0.4; }`,
    }));
  },
  nodeCreated(node) {
    if (!(node.comfyClass in INSTEAD)) return;
    for (const name of INSTEAD[node.comfyClass]) {
      const combo = widget(node, name);
      if (combo) after(combo, "callback", () => refresh(node));
    }
    after(node, "onConfigure", () => refresh(node));
    setTimeout(() => refresh(node)); // after the values of a workflow are in
  },
});
