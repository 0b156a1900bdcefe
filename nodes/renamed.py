"""Nodes that had another id once, so that ComfyUI opens old workflows with the new one. Older ComfyUIs know no such
thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api import latest
from comfy_api.latest import io

RENAMED: dict[str, str] = {}  # from the old id to the new one; inputs and outputs are the same


def replacement(old: str, node: type[io.ComfyNode]) -> dict[str, Any]:
    """What `io.NodeReplace` takes. Every input is named: one that is not would lose its value in silence."""
    schema = node.define_schema()
    widgets: list[str] = []  # in the order of a workflow's values
    for one in schema.inputs:
        if isinstance(one, io.WidgetInput):
            widgets += [one.id, *[""] * bool(getattr(one, "control_after_generate", None))]
    return {
        "new_node_id": schema.node_id, "old_node_id": old, "old_widget_ids": widgets,
        "input_mapping": [{"new_id": one.id, "old_id": one.id} for one in schema.inputs],
        "output_mapping": [{"new_idx": i, "old_idx": i} for i in range(len(schema.outputs))],
    }  # fmt: skip


async def register_renamed(nodes: Sequence[type[io.ComfyNode]], renamed: Mapping[str, str] = RENAMED) -> None:
    if not renamed or not hasattr(io, "NodeReplace"):
        return
    by_id = {node.define_schema().node_id: node for node in nodes}
    for old, new in renamed.items():
        found = io.NodeReplace(**replacement(old, by_id[new]))
        await latest.ComfyAPI().node_replacement.register(found)
