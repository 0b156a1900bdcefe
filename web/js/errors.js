// @ts-check
// The error of each of our nodes, in its own panel: of a run that failed there, and of a run that the server refused.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { findNode, showError } from "./panel.js";

const LOOK_EVERY = 200; // milliseconds
const LOOK_FOR = 60_000;
const LONGEST = 1000; // letters

/** @type {Record<"failed" | "refused", Set<any>>} the nodes that show an error, by what it is about */
const shown = { failed: new Set(), refused: new Set() };

/** Show what is wrong with nodes, and take the errors of an earlier run away. */
function show(/** @type {"failed" | "refused"} */ kind, /** @type {[any, string][]} */ errors) {
  for (const node of shown[kind]) showError(node, "");
  shown[kind] = new Set(errors.map(([node]) => node));
  for (const [node, text] of errors) showError(node, text.slice(0, LONGEST), kind === "failed");
}

/** The sentence of an exception, without the class that Python puts before it. */
function failure({ exception_message: message = "", exception_type: type = "" }) {
  const sentence = message.replace(/^[\w.]+(Error|Exception|Interrupt): /, "").trim();
  return sentence || type.split(".").pop();
}

/** What the server has against a node's inputs; of our own checks only what they say. */
function refusal(/** @type {{ errors: { type: string, message: string, details: string }[] }} */ { errors }) {
  const said = errors.map(({ type, message, details }) => {
    if (type === "custom_validation_failed") return details.replace(/^\w+ - /, "");
    return details ? `${message}: ${details}` : message;
  });
  return [...new Set(said)].join("\n"); // the same check is reported for each of its inputs
}

// What the answer to Run says of nodes in the open workflow.
/** @returns {[any, string][]} */
function refusals() {
  /** @type {[string, any][]} */
  const found = Object.entries(app.lastNodeErrors ?? {});
  return found.flatMap(([id, errors]) => {
    const node = findNode(id);
    return node?.comfyClass === errors.class_type ? [[node, refusal(errors)]] : [];
  });
}

/** Newer pages tell when Run is pressed, not when it is refused: look until there is an answer. */
function awaitAnswer() {
  const before = app.lastNodeErrors;
  const since = performance.now();
  show("refused", []);
  clearInterval(looking);
  looking = setInterval(() => {
    const answered = app.lastNodeErrors && app.lastNodeErrors !== before;
    if (answered) show("refused", refusals());
    if (answered || performance.now() - since > LOOK_FOR) clearInterval(looking);
  }, LOOK_EVERY);
}

/** @type {ReturnType<typeof setInterval> | undefined} */
let looking;

app.registerExtension({
  name: "safe_region.errors",
  setup() {
    api.addEventListener("promptQueueing", awaitAnswer);
    api.addEventListener("promptQueued", () => show("refused", refusals()));
    api.addEventListener("execution_start", () => show("failed", []));
    api.addEventListener("execution_error", ({ detail }) => {
      const node = findNode(detail.node_id);
      if (node?.comfyClass === detail.node_type) show("failed", [[node, failure(detail)]]);
    });
  },
});
