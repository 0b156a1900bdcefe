"""The list of nodes that ComfyUI gets."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apply import SafeRegionConditioning
from .balance import SafeRegionBalance, TrainBalanceRegion
from .combine import SafeRegionCombine
from .demo import SafeRegionDemoModel
from .files import SafeRegionLoader, SaveSafeRegion
from .guard import SafeRegionGuardModel
from .guard_report import SafeRegionGuardReport
from .inspect import SafeRegionInspect
from .pairs import SafeRegionPromptPairs
from .renamed import register_renamed
from .routes import register_routes
from .train import TrainSafeRegion

# What is used most comes first: the page lists them in this order, and offers only the first few to a dropped wire.
NODES: list[type[io.ComfyNode]] = [
    SafeRegionLoader, SafeRegionConditioning, SafeRegionGuardModel, TrainSafeRegion, SaveSafeRegion, SafeRegionInspect,
    SafeRegionCombine, SafeRegionGuardReport, SafeRegionPromptPairs, SafeRegionBalance, TrainBalanceRegion,
    SafeRegionDemoModel,
]  # fmt: skip


class SafeRegionExtension(ComfyExtension):
    async def on_load(self) -> None:
        await register_renamed(NODES)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_routes()
        return NODES
