"""The example workflows: reading them, checking them against what a ComfyUI offers, and making them quick to run."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from host import PACK, links_of, widget_names

Workflow = dict[str, Any]
NAMES = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
GUARDED = sorted(path.stem for path in (PACK / "subgraphs").glob("Safe Text to *.json"))
TRY_IT = "Safe Region 1 - Try it - NSFW safety filter"
TRAIN = "Safe Region 2 - Train - remove a concept"
GIVEN = "Safe Region 3 - Use a region - moderation"
TRAIN_AND_APPLY = "Safe Region 4 - Train and apply"
APPLY = "Safe Region 5 - Unsafe and harmless prompts"
GUARD = "Safe Region 6 - Guard a model - censor every prompt"
TWO_CONCEPTS = "Safe Region 7 - For kids - two concepts"
BALANCE = "Safe Region 8 - Bias - balance a batch"
INSPECT = "Safe Region 9 - Inspect a prompt"
CFG_1 = "Safe Region for CFG 1"
FLUX, FLUX_TRAIN = "Safe Region for Flux - apply", "Safe Region for Flux - train"
SDXL = "Safe Region for SDXL"
# What stands in for a real model: which outputs of Safe Region Demo Model a loader's own outputs are.
LOADERS = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}
OUTPUTS = (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))
PAIRS = "a photo of a {handgun|gun|pistol|knife|dagger|sword|bomb|axe} => a {tulip|car|key|cup|tree|hat|cake|dog}"
FEW_PAIRS = {"SafeRegionPromptPairs": {"text": PAIRS, "pack": "none"}}
QUICK = {
    "KSampler": {"steps": 2},
    "TrainSafeRegion": {"preset": "instant", "size": 64},
    "SaveSafeRegion": {"overwrite": True},
}
SMALL = FEW_PAIRS | {
    "EmptyLatentImage": {"width": 128, "height": 128},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "SafeRegionLoader": {"region_name": "demo-weapons.safetensors"},
}


def example(name: str) -> Workflow:
    return json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def with_region(name: str) -> Workflow:
    """A guarded blueprint with the demo's region connected, and its verdict shown."""
    workflow = json.loads((PACK / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    (node,) = workflow["nodes"]
    slot = [slot["name"] for slot in node["inputs"]].index("region")
    verdict = [slot["name"] for slot in node["outputs"]].index("opened")
    loader = {
        "id": 2, "type": "SafeRegionLoader", "pos": [-420, 0], "size": [360, 400], "flags": {}, "order": 0, "mode": 0,
        "inputs": [{"name": "region_name", "type": "COMBO", "widget": {"name": "region_name"}, "link": None}],
        "outputs": [{"name": "region", "type": "SAFE_REGION", "links": [1]}], "properties": {},
        "widgets_values": ["demo-weapons.safetensors"],
    }  # fmt: skip
    shown = {
        "id": 3, "type": "PreviewAny", "pos": [460, 0], "size": [260, 120], "flags": {}, "order": 2, "mode": 0,
        "inputs": [{"name": "source", "type": "*", "link": 2}], "outputs": [], "properties": {}, "widgets_values": [],
    }  # fmt: skip
    node["inputs"][slot]["link"], node["outputs"][verdict]["links"] = 1, [2]
    links = [[1, 2, 0, 1, slot, "SAFE_REGION"], [2, 1, verdict, 3, 0, "BOOLEAN"]]
    return {**workflow, "last_node_id": 3, "last_link_id": 2, "nodes": [loader, node, shown], "links": links}


def slug(name: str) -> str:
    """The example's name in those of its pictures."""
    return re.sub(r"[^a-z0-9]+", "_", name.removeprefix("Safe Region ").lower())


def of_real_models(workflow: Workflow) -> bool:
    return any(node["type"] in LOADERS for node in workflow["nodes"])


def subgraphs(workflow: Workflow) -> dict[str, Any]:
    return {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", [])}


def changed(workflow: Workflow, object_info: dict[str, Any], values: dict[str, dict[str, Any]]) -> Workflow:
    """A copy with other widget values, by the type of node, where a subgraph shows them on its own node, too."""
    workflow = copy.deepcopy(workflow)
    inner = subgraphs(workflow)
    for node in (node for graph in (workflow, *inner.values()) for node in graph["nodes"]):
        if node["type"] in inner:
            names, new = shown_by_subgraph(inner[node["type"]], values)
        else:
            new = values.get(node["type"], {})
            names = widget_names(object_info[node["type"]]) if new else []
        for name, value in new.items():
            node["widgets_values"][names.index(name)] = value
    return workflow


def shown_by_subgraph(subgraph: Workflow, values: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The widgets on a subgraph's node, and the new values of those that stand for an inner node's."""
    nodes, links, names, new = {node["id"]: node for node in subgraph["nodes"]}, links_of(subgraph), [], {}
    for slot in subgraph["inputs"]:
        _, _, target, into, _ = links[slot["linkIds"][0]]
        inner = nodes[target]["inputs"][into]
        if "widget" in inner:
            names.append(slot["name"])
            others = values.get(nodes[target]["type"], {})
            new |= {slot["name"]: others[inner["name"]]} if inner["name"] in others else {}
    return names, new


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
    """Where a workflow, or a subgraph in it, is not what this ComfyUI's nodes ask for."""
    inner = subgraphs(workflow)
    return [found for graph in (workflow, *inner.values()) for found in misfits_of(graph, inner, object_info)]


def misfits_of(graph: Workflow, inner: dict[str, Any], object_info: dict[str, Any]) -> list[str]:
    found = []
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        if node["type"] == "MarkdownNote":
            continue
        if subgraph := inner.get(node["type"]):
            ends = [[(end["name"], end["type"]) for end in part[side]] for part in (node, subgraph)
                    for side in ("inputs", "outputs")]  # fmt: skip
            if ends[:2] != ends[2:] or any(slot["link"] is None and "widget" not in slot for slot in node["inputs"]):
                found.append(f"{subgraph['name']} is not connected as it wants to be")
            continue
        info = object_info.get(node["type"])
        if info is None:
            found.append(f"no node {node['type']}")
            continue
        specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        offered = list(zip(info["output_name"], info["output"]))[: len(node["outputs"])]  # newer nodes may have more
        if [(out["name"], out["type"]) for out in node["outputs"]] != offered:
            found.append(f"{node['type']} has other outputs")
        for slot in node["inputs"]:
            kind = specs.get(slot["name"], [None])[0]
            if slot["type"] != ("COMBO" if isinstance(kind, list) else kind):
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
    given, returned = graph.get("inputs", []), graph.get("outputs", [])
    for source, out, target, into, kind in links_of(graph).values():
        ends = [(given[out] if source == -10 else nodes[source]["outputs"][out])["type"],
                (returned[into] if target == -20 else nodes[target]["inputs"][into])["type"]]  # fmt: skip
        if kind != ends[0] or ("*" not in ends and ends[0] != ends[1]):
            found.append(f"{source} to {target}: {kind} joins {' and '.join(ends)}")
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
