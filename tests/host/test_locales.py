"""What the nodes say is what locales/en holds, which translators start from. SAFE_REGION_LOCALES=1 writes it anew."""

from __future__ import annotations

import json
import os
from typing import Any

from host import PACK, PACK_FOLDER

ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"


def texts(info: dict[str, Any]) -> dict[str, Any]:
    """A node's texts in the form of nodeDefs.json."""
    inputs = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            inputs[name] = {"name": spec[1].get("display_name") or name, "tooltip": spec[1]["tooltip"]}
    outputs = {str(i): {"name": name, "tooltip": tooltip}
               for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"]))}  # fmt: skip
    return {"display_name": info["display_name"], "description": info["description"], "inputs": inputs,
            **({"outputs": outputs} if outputs else {})}  # fmt: skip


def test_english_is_what_the_nodes_say(object_info):
    said = {name: texts(info) for name, info in sorted(object_info.items())
            if info["python_module"].endswith(PACK_FOLDER)}  # fmt: skip
    if os.environ.get("SAFE_REGION_LOCALES"):
        ENGLISH.parent.mkdir(parents=True, exist_ok=True)
        ENGLISH.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(ENGLISH.read_text(encoding="utf-8")) == said


def test_the_server_hands_the_translations_out(comfy):
    found = comfy.get("/i18n")
    for language in (folder.name for folder in ENGLISH.parent.parent.iterdir()):
        assert found[language]["nodeDefs"]["SafeRegionConditioning"]["display_name"]
