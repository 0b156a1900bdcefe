"""The list of nodes that ComfyUI gets."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import apply, balance, combine, demo, files, guard, inspect, pairs, train
from .routes import register_routes


class SafeRegionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_routes()
        modules = (demo, pairs, train, files, combine, apply, guard, balance, inspect)
        return [node for module in modules for node in module.NODES]
