"""Run in ComfyUI's interpreter and tree: what our nodes' functions make of being given all inputs of their schema.

    python call_nodes.py REPORT

ComfyUI calls `fingerprint_inputs` and `execute` with every input by name, and `validate_inputs` with those it asks for.
REPORT is JSON: for each node, by function, an error or nothing, and whether a second call gives the same.
"""
from __future__ import annotations

import asyncio
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path.cwd()))  # ComfyUI's tree
from comfy.cli_args import args

args.cpu = True
PACK = ModuleType("pack")
PACK.__path__ = [str(Path(__file__).parents[2])]
sys.modules["pack"] = PACK
import_module("pack.nodes.folders").register_folders()
extension = import_module("pack.nodes.extension")


def default(spec: Any) -> Any:
    """What a widget holds at first; None for what only a link can give."""
    options = getattr(spec, "options", None)
    first = getattr(spec, "default", None)
    return options[0] if first is None and options else first


def outcome(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def looked_at(node: Any) -> dict[str, Any]:
    inputs = {spec.id: default(spec) for spec in node.define_schema().inputs}
    own = vars(node)
    found: dict[str, Any] = {"execute": outcome(lambda: inspect.signature(node.execute).bind(**inputs))}
    if "fingerprint_inputs" in own:
        found["fingerprint_inputs"] = outcome(lambda: node.fingerprint_inputs(**inputs, one_more_input=1))
        found["same"] = node.fingerprint_inputs(**inputs) == node.fingerprint_inputs(**inputs)
    if "validate_inputs" in own:
        asked = inspect.signature(node.validate_inputs).parameters
        found["validate_inputs"] = outcome(lambda: node.validate_inputs(**{name: inputs[name] for name in asked}))
    return found


nodes = asyncio.run(extension.SafeRegionExtension().get_node_list())
report = {node.define_schema().node_id: looked_at(node) for node in nodes}
Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
