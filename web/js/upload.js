// @ts-check
// Putting a region file into the server's folder: checked there, and never over another file without asking.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { t } from "./texts.js";

/** @param {{ name: string }} file */
export const isRegionFile = (file) => file.name.toLowerCase().endsWith(".safetensors");

/** A toast. @param {"success" | "warn" | "error"} severity @param {string} summary @param {string} [detail] */
export function tell(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "success" ? 4000 : 12000 });
}

/** Ask yes or no. @param {string} title @param {string} message @returns {Promise<boolean>} */
export async function confirmed(title, message) {
  return Boolean(await app.extensionManager.dialog.confirm({ title, message }));
}

/**
 * Send a file to the regions' folder.
 * @param {File} file
 * @returns {Promise<{ name: string, sha256: string } | null>} what it is called there; null when it was not taken
 */
export async function upload(file, overwrite = false) {
  const form = new FormData();
  form.append("file", file, file.name);
  if (overwrite) form.append("overwrite", "true");
  let answer, reply;
  try {
    // no other site can send this header (nodes/origins.py)
    const headers = { "X-Safe-Region": "1" };
    answer = await api.fetchApi("/safe_region/upload", { method: "POST", body: form, headers });
    reply = await answer.json();
  } catch (error) {
    tell("error", t("The file was not uploaded."), String(error?.message ?? error));
    return null;
  }
  if (answer.ok) {
    tell("success", t("Region saved"), reply.name);
    return reply;
  }
  if (answer.status === 409 && !overwrite) {
    return (await confirmed(t("Replace the region?"), `${reply.error} ${t("Replace it with the new file?")}`))
      ? upload(file, true) : null;
  }
  tell("error", t("The file was not taken."), reply.error);
  return null;
}
