// @ts-check
// Our texts in the page's language: locales/<language>/main.json, English where there is none.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** @type {Record<string, string>} */
let known = {};

/**
 * A text in the page's language, with `{name}` replaced.
 * @param {string} english
 * @param {Record<string, string | number>} [values]
 */
export function t(english, values = {}) {
  return (known[english] ?? english).replace(/\{(\w+)\}/g, (all, name) => String(values[name] ?? all));
}

app.registerExtension({
  name: "safe_region.texts",
  async init() {
    const language = app.extensionManager.setting.get("Comfy.Locale");
    if (!language || language === "en") return;
    try {
      const answer = await api.fetchApi("/i18n");
      known = (await answer.json())[language]?.safeRegion ?? {};
    } catch {
      known = {}; // English then
    }
  },
});
