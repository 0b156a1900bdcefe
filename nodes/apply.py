"""Applying a region: between the text encoder and the sampler."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..region import Region, apply_to_conditioning
from ..region.inspection import judge
from .common import KEEP_OUT, SafeRegionType, gate_outputs, gate_ui, gate_values, schema, status, steering_inputs
from .steering_status import steering_status


class SafeRegionConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionConditioning",
            display_name="Apply Safe Region",
            description="Moves unsafe prompts into the safe region before sampling starts. Place it between CLIP Text "
            "Encode and the sampler's positive input. Prompts that are inside the region already come out unchanged.",
            search_aliases=[
                *KEEP_OUT, "block words", "forbidden words", "banned words", "blacklist", "blocklist",
                "negative prompt", "steer", "steering", "steering vector", "steer conditioning", "remove concept",
                "erase",
            ],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, from CLIP Text Encode or any other node."),
                SafeRegionType.Input("region", tooltip="The safe region, from Load Safe Region or Train Safe Region."),
                *steering_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="The prompt, for the sampler."),
                *gate_outputs(),
            ],
            has_intermediate_output=True,  # so that a run in which it comes from the cache has what it said, too
        )  # fmt: skip

    @classmethod
    def execute(
        cls, conditioning: list[Any], region: Region, strength: float = 1.0, mode: str = "auto", start: float = 0.0,
        end: float = 1.0, unknown_text: str = "refuse",
    ) -> io.NodeOutput:  # fmt: skip
        steered = apply_to_conditioning(conditioning, region, strength, mode, start, end, unknown_text == "allow")
        judged = judge(conditioning, region)
        told = steering_status(judged, conditioning, region, strength, mode, start, end)
        return io.NodeOutput(steered, *gate_values(judged), ui=status(told) | gate_ui(judged))
