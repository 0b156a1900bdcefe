// @ts-check
// The card of a region on Load Safe Region, and what the workflow carries of the region: hash, source, or all of it.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { after, element, onExecuted, panel, showError, toned, widget } from "./panel.js";
import { t } from "./texts.js";
import { confirmed, isRegionFile, tell, upload } from "./upload.js";

const NODE = "SafeRegionLoader";
const SAVE = "SaveSafeRegion";
const CARRIED = "carried";
const SEARCHED = 12; // a longer list must be searched, which the classic canvas offers for values only

/**
 * What the server says about a loader (nodes/cards.py, Standing).
 * @typedef {{ state: string, message: string, card: Record<string, any> | null, carried: string, in_folder: boolean,
 *   refusal: string }} Standing
 */

/** @type {WeakMap<any, number>} the last question about each node: an older answer is dropped */
const asked = new WeakMap();

const chosen = (node) => String(widget(node, "region_name")?.value ?? "");

/** Every loader of the open workflow, in subgraphs too. */
function loaders() {
  const root = app.rootGraph ?? app.graph;
  const graphs = [root, ...(root?.subgraphs?.values() ?? [])];
  return graphs.flatMap((graph) => graph?.nodes ?? []).filter((node) => node.comfyClass === NODE);
}

/**
 * Ask the server about the node's region, and show the answer.
 * @param {any} node
 * @param {{ carried?: string, embed?: boolean }} [changes] what the workflow is to carry instead; whether to embed
 */
async function refresh(node, { carried, embed = false } = {}) {
  const memory = widget(node, CARRIED);
  if (!memory) return;
  const question = (asked.get(node) ?? 0) + 1;
  asked.set(node, question);
  const name = chosen(node);
  let reply;
  try {
    const answer = await api.fetchApi("/safe_region/card", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name, carried: String(carried ?? memory.value ?? ""), embed }),
    });
    reply = await answer.json();
    if (!answer.ok) throw new Error(reply.error);
  } catch (error) {
    tell("error", t("The region's card could not be read."), String(error?.message ?? error));
    return;
  }
  if (asked.get(node) !== question || chosen(node) !== name) return;
  if (memory.value !== reply.carried) memory.value = reply.carried;
  list(node);
  show(node, reply);
}

/** What the workflow carries, read here; nothing when it is damaged. @returns {Record<string, any>} */
function carriedBy(node) {
  try {
    return JSON.parse(widget(node, CARRIED).value) ?? {};
  } catch {
    return {};
  }
}

/** List an embedded region too, so that the page does not call its file missing; and say what each file is. */
function list(node) {
  const combo = widget(node, "region_name");
  const { name, data } = carriedBy(node);
  const known = combo.options.values;
  if (data && name === combo.value && Array.isArray(known) && !known.includes(name)) {
    combo.options.values = [...known, name];
  }
  const few = combo.options.values.length <= SEARCHED || globalThis.LiteGraph.vueNodesMode;
  combo.options.getOptionLabel = few ? listed : undefined;
}

/** @type {Record<string, { label: string, kind: string, poor: string }>} what the server says of each file in the list */
let described = {};

async function readList() {
  try {
    described = (await (await api.fetchApi("/safe_region/list")).json()).regions ?? {};
  } catch {
    described = {}; // the names alone then
  }
  app.canvas?.setDirty(true, true);
}

/** How a file stands in the list: with its concept and model. @param {string | null} name */
function listed(name) {
  const { label = "", kind = "", poor = "" } = described[name ?? ""] ?? {};
  const said = { weak: t("weak"), useless: t("useless") }[poor];
  const more = [label, kind === "balance" ? t("balance") : "", said].filter(Boolean);
  return more.length ? [name?.replace(/\.safetensors$/, ""), ...more].join(" · ") : name ?? "";
}

/** Choose a file that the list may not have yet. */
async function choose(node, { name }) {
  await app.refreshComboInNodes();
  widget(node, "region_name").value = name;
  node.setDirtyCanvas?.(true, true);
  await refresh(node, { carried: "" });
}

/** Put a file into the regions' folder and choose it. */
async function take(node, file) {
  const stored = await upload(file);
  if (stored) await choose(node, stored);
}

/** Write the embedded region into a file; it stays embedded. */
async function save(node) {
  const bytes = Uint8Array.from(atob(carriedBy(node).data), (letter) => letter.charCodeAt(0));
  if (await upload(new File([bytes], chosen(node)))) await app.refreshComboInNodes();
}

/** Carry the hash only; asks first when there is no file. */
async function remove(node, reply) {
  if (!reply.in_folder && !(await confirmed(t("Remove the region from the workflow?"),
    t("It is not in your regions' folder. Save it as a file first if you want to keep it.")))) return;
  const { data, ...rest } = carriedBy(node);
  await refresh(node, { carried: JSON.stringify(rest) });
}

/** Go on with the region that the workflow brought, under a name that says which one it is and that no file has. */
async function keepBrought(node) {
  const brought = carriedBy(node);
  const name = `${chosen(node).replace(/\.safetensors$/i, "")} (${brought.sha256.slice(0, 12)}).safetensors`;
  widget(node, CARRIED).value = JSON.stringify({ ...brought, name });
  widget(node, "region_name").value = name;
  list(node);
  await settle(node);
}

/** Ask anew after a choice; what an earlier run said is no longer so. */
async function settle(node, changes = {}) {
  showError(node, "");
  await refresh(node, changes);
}

/** A file chooser for region files. */
function browse(node) {
  const input = element("input", { type: "file", accept: ".safetensors" });
  input.onchange = () => input.files[0] && take(node, input.files[0]);
  input.click();
}

// --- what is seen ---

/** What is wrong, in a word; nothing when it can run. @param {string} state */
function trouble(state) {
  if (state === "missing") return t("Missing");
  if (state === "changed") return t("Changed");
  if (state === "differs") return t("Not your file");
  return state === "damaged" ? t("Damaged") : "";
}

/** @param {string} label @param {() => void} act @param {string} [refusal] why it cannot be pressed */
function button(label, act, refusal = "") {
  return element("button", {
    type: "button", textContent: label, title: refusal, "aria-disabled": String(Boolean(refusal)),
    onclick: () => (refusal ? tell("warn", label, refusal) : act()),
    style: {
      flex: "1 1 auto", padding: "3px 8px", font: "inherit", color: "var(--input-text)", cursor: "pointer",
      background: "var(--comfy-menu-bg)", border: "1px solid var(--border-color)", borderRadius: "4px",
      opacity: refusal ? "0.5" : "1",
    },
  });
}

/** A name and a value; nothing without a value. */
function row(name, value) {
  if (!value) return null;
  return element("div", {}, element("span", { textContent: `${name} `, style: { color: "var(--descrip-text)" } }), value);
}

/** Ways out of what is wrong. @returns {HTMLElement[]} */
function choices(node, { state, in_folder: there }) {
  const own = () => settle(node, { carried: "" });
  if (state === "differs") {
    return [button(t("Use my file"), own), button(t("Use the one in the workflow"), () => keepBrought(node))];
  }
  return there && state !== "missing" ? [button(t("Use the file as it is now"), own)] : [];
}

function alertBox(node, reply) {
  return element("div", {
    role: "alert",
    style: {
      padding: "6px 8px", borderRadius: "4px", border: "1px solid var(--error-text)", display: "flex",
      flexDirection: "column", gap: "6px",
    },
  },
  element("span", {},
    element("strong", { textContent: `${trouble(reply.state)}. `, style: { color: "var(--error-text)" } }), reply.message),
  ...choices(node, reply));
}

function heading(card, embedded) {
  const kilobytes = t("{size} kB", { size: Math.ceil(card.bytes / 1024) });
  const size = embedded ? t("embedded, {size}", { size: kilobytes }) : kilobytes;
  return element("div", {}, element("strong", { textContent: card.title, style: { fontSize: "14px" } }),
    element("span", { textContent: ` ${size}`, style: { color: "var(--descrip-text)", whiteSpace: "nowrap" } }));
}

/** The picture, and beside it what its author says. */
function description(card) {
  return element("div", { style: { display: "flex", gap: "8px" } },
    card.preview && element("img", {
      src: card.preview, alt: t("Preview of {title}", { title: card.title }), draggable: false,
      style: { flex: "none", maxWidth: "96px", maxHeight: "96px", borderRadius: "4px", alignSelf: "start" },
    }),
    element("div", { textContent: card.description, style: { flex: "1", minWidth: "0" } }));
}

/** The checkpoint that it was learned on, and what kind of model that is. */
function model({ checkpoint = "", base_model: kind }) {
  const name = checkpoint.replace(/\.(safetensors|ckpt|gguf|sft)$/, "");
  return name && kind ? `${name} (${kind})` : name || kind;
}

/** Who made it, and when. */
function origin({ author, created: date }) {
  if (!author) return row(t("made on"), date);
  return row(t("made by"), date ? t("{author} on {date}", { author, date }) : author);
}

/** What one wants to know first stands first. */
function facts(card, embedded) {
  return [
    ...verdicts(card),
    heading(card, embedded),
    row(t("effect"), card.effect),
    row(t("harmless"), card.harmless_touched),
    row(t("model"), model(card)),
    description(card),
    row(t("concept"), card.concept !== card.title ? card.concept : ""),
    row(t("parts"), card.parts.length > 1 ? card.parts.join(", ") : ""),
    row(t("learned on"), card.encoder),
    row(t("recipe"), card.recipe),
    row(t("licence"), card.licence),
    origin(card),
    row(t("source"), card.source),
    row(t("hash"), card.sha256.slice(0, 12)),
  ];
}

function buttons(node, reply) {
  const { state, refusal } = reply;
  const all = [button(t("Upload…"), () => browse(node))];
  if (state === "embedded") {
    all.push(button(t("Save as file"), () => save(node)), button(t("Remove from workflow"), () => remove(node, reply)));
  } else if (state === "ok") {
    all.push(button(t("Embed in workflow"), () => refresh(node, { embed: true }), refusal));
  }
  return element("div", { style: { display: "flex", flexWrap: "wrap", gap: "4px", flex: "none" } }, ...all);
}

const panelOf = (node) => panel(node, "safe_region_card", {
  height: 290, role: "group", label: t("Region card"), beside: () => true,
});

/** What is good or bad about a region, before any number. */
function verdicts(card) {
  const found = [card.verdict, { text: card.unfinished, tone: /** @type {const} */ ("warn") }];
  return found.filter((one) => one?.text).map(toned);
}

/** @param {any} node @param {Standing} reply */
function show(node, reply) {
  const card = panelOf(node);
  Object.assign(card.style, { display: "flex", flexDirection: "column", gap: "6px", overflow: "hidden" });
  const about = element("div", {
    tabIndex: 0, role: "region", "aria-label": t("About this region"),
    style: {
      flex: "1 1 0px", minHeight: "222px", overflow: "auto", display: "flex", flexDirection: "column", gap: "3px",
    },
  }, trouble(reply.state) ? alertBox(node, reply) : reply.message && toned({ text: reply.message, tone: "warn" }),
  ...(reply.card ? facts(reply.card, reply.state === "embedded") : []));
  if (trouble(reply.state)) showError(node, ""); // the card says it, and how to mend it
  card.replaceChildren(about, buttons(node, reply));
  card.ondragover = (event) => event.preventDefault();
  card.ondrop = (event) => drop(node, event);
}

/** A region file dropped on the node. @returns {Promise<boolean>} whether it was one */
async function drop(node, event) {
  const file = [...(event.dataTransfer?.files ?? [])].find(isRegionFile);
  if (!file) return false;
  event.preventDefault();
  event.stopPropagation();
  await take(node, file);
  return true;
}

app.registerExtension({
  name: "safe_region.region_card",
  getCustomWidgets() {
    return {
      /** Text that is saved and sent, and never shown: the card is its face. */
      SAFE_REGION_CARRIED: (node, name) => {
        const made = node.addCustomWidget({
          name, type: "safe_region_carried", value: "", hidden: true, y: 0,
          options: { socketless: true, hidden: true }, computeSize: () => [0, -4], draw() {},
        });
        return { widget: made };
      },
    };
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    panelOf(node);
    list(node);
    after(widget(node, "region_name"), "callback", () => refresh(node));
    after(node, "onConfigure", () => {
      list(node);
      refresh(node);
    });
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => drop(node, event);
    setTimeout(() => refresh(node)); // after the values of a workflow are in
  },
  refreshComboInNodes() {
    readList();
    loaders().forEach((node) => refresh(node));
  },
  setup() {
    readList();
    onExecuted([SAVE], () => app.refreshComboInNodes()); // list the file
    api.addEventListener("safe_region.training", ({ detail }) => detail.state === "stopped" && app.refreshComboInNodes());
    for (const end of ["execution_success", "execution_error"]) {
      api.addEventListener(end, () => loaders().forEach((node) => refresh(node)));
    }
  },
});
