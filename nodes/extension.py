"""The list of nodes that ComfyUI gets."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import apply, balance, demo, files, guard, train


class SafeRegionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*demo.NODES, *train.NODES, *files.NODES, *apply.NODES, *guard.NODES, *balance.NODES]
