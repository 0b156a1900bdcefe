"""The example workflows: reading them, checking them against what a ComfyUI offers, and making them quick to run."""

from __future__ import annotations

import copy
import json
from typing import Any

from host import PACK, widget_names

Workflow = dict[str, Any]
NAMES = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
# What stands in for a real model: which outputs of Safe Region Demo Model a loader's own outputs are.
LOADERS = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}
OUTPUTS = (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))
PAIRS = "a photo of a {handgun|gun|pistol|knife|dagger|sword|bomb|axe} => a {tulip|car|key|cup|tree|hat|cake|dog}"
QUICK = {
    "KSampler": {"steps": 2},
    "TrainSafeRegion": {"preset": "instant", "size": 64},
    "SaveSafeRegion": {"overwrite": True},
}
SMALL = {
    "SafeRegionPromptPairs": {"text": PAIRS},
    "EmptyLatentImage": {"width": 128, "height": 128},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "SafeRegionLoader": {"region_name": "demo-weapons.safetensors"},
}


def example(name: str) -> Workflow:
    return json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def of_real_models(workflow: Workflow) -> bool:
    return any(node["type"] in LOADERS for node in workflow["nodes"])


def changed(workflow: Workflow, object_info: dict[str, Any], values: dict[str, dict[str, Any]]) -> Workflow:
    """A copy with other widget values, by the type of node."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        names = widget_names(object_info[node["type"]]) if node["type"] in values else []
        for name, value in values.get(node["type"], {}).items():
            node["widgets_values"][names.index(name)] = value
    return workflow


def on_demo_model(workflow: Workflow, object_info: dict[str, Any]) -> Workflow:
    """A copy that loads the demo model and its region in place of files that are not here."""
    if not of_real_models(workflow):
        return workflow
    workflow = changed(workflow, object_info, SMALL)
    for node in workflow["nodes"]:
        if slots := LOADERS.get(node["type"]):
            outputs = [{"name": name, "type": kind, "links": []} for name, kind in OUTPUTS]
            for slot, output in zip(slots, node["outputs"]):
                outputs[slot]["links"] = output["links"]
                for link in workflow["links"]:
                    link[2] = slot if link[0] in output["links"] else link[2]
            node |= {"type": "SafeRegionDemoModel", "outputs": outputs, "widgets_values": []}
            node["properties"] = {"Node name for S&R": node["type"]}
    return workflow


def misfits(workflow: Workflow, object_info: dict[str, Any]) -> list[str]:
    """Where a workflow is not what this ComfyUI's nodes ask for."""
    found = []
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for node in nodes.values():
        if node["type"] == "MarkdownNote":
            continue
        info = object_info.get(node["type"])
        if info is None:
            found.append(f"no node {node['type']}")
            continue
        specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        if [(out["name"], out["type"]) for out in node["outputs"]] != list(zip(info["output_name"], info["output"])):
            found.append(f"{node['type']} has other outputs")
        for slot in node["inputs"]:
            if specs.get(slot["name"], [None])[0] != slot["type"]:
                found.append(f"{node['type']}: no input {slot['name']} of type {slot['type']}")
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        widgets = widget_names(info)
        found += [f"{node['type']}: {name} is not connected" for name in info["input"].get("required", {})
                  if name not in linked and name not in widgets]  # fmt: skip
        if len(node["widgets_values"]) > len(widgets):
            found.append(f"{node['type']} has too many values")
        for name, value in zip(widgets, node["widgets_values"]):
            found += [f"{node['type']}.{name}: {value!r} is {wrong}" for wrong in [name and unfit(specs[name], value)]
                      if wrong]  # fmt: skip
    for _, source, out, target, into, kind in workflow["links"]:
        ends = nodes[source]["outputs"][out]["type"], nodes[target]["inputs"][into]["type"]
        if kind != ends[0] or ("*" not in ends and ends[0] != ends[1]):
            found.append(f"{nodes[source]['type']} to {nodes[target]['type']}: {kind} joins {' and '.join(ends)}")
    return found


def unfit(spec: list[Any], value: Any) -> str:
    """What is wrong with a widget's value; of files, those of models are not here."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices is not None:
        return "" if value in choices or str(value).endswith(".safetensors") else f"not among {choices}"
    python = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
    if not isinstance(value, python) or isinstance(value, bool) != (kind == "BOOLEAN"):
        return f"no {kind}"
    if kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return "out of range"
    return ""
