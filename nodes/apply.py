"""Applying a region: between the text encoder and the sampler."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..region import Region, apply_to_conditioning
from .common import SafeRegionType, schema


class SafeRegionConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionConditioning",
            display_name="Apply Safe Region",
            description="Moves unsafe prompts into the safe region before sampling starts. Place it between CLIP Text "
            "Encode and the sampler's positive input. Prompts that are inside the region already come out unchanged.",
            search_aliases=["safe region", "safety", "steer conditioning", "nsfw", "concept removal"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, from CLIP Text Encode or any other node."),
                SafeRegionType.Input("region", tooltip="The safe region, from Load Safe Region or Train Safe Region."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=4.0, step=0.05, optional=True,
                    tooltip="How far an unsafe prompt is moved: 1 is what was learned, 0 changes nothing.",
                ),
                io.Combo.Input(
                    "mode", options=["auto", "gated", "always"], default="auto", optional=True,
                    tooltip="auto: move only prompts outside of the region, if the region can tell. gated: the same, "
                    "but refuse a region that cannot tell. always: move every prompt.",
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="Share of sampling after which the region acts. 0 is from the first step on; a later start "
                    "keeps more of the layout and removes less.",
                ),
                io.Float.Input(
                    "end", default=1.0, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="Share of sampling after which the region no longer acts. 1 is to the last step.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The prompt, for the sampler.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, conditioning: list[Any], region: Region, strength: float = 1.0, mode: str = "auto", start: float = 0.0,
        end: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        return io.NodeOutput(apply_to_conditioning(conditioning, region, strength, mode, start, end))


NODES = [SafeRegionConditioning]
