"""Several regions as one."""

from __future__ import annotations

from comfy_api.latest import io

from ..region import Region, combine
from ..region.conditioning import check_together
from .common import SafeRegionType, schema


class SafeRegionCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionCombine",
            display_name="Combine Safe Regions",
            description="Makes one safe region of up to four: a prompt must be inside all of them, and is moved out of "
            "whatever it touches. The order does not matter, and a region that comes twice acts once. For more than "
            "four, combine what came out again.",
            search_aliases=["safe region", "merge regions", "intersection", "several concepts", "multiple regions"],
            inputs=[
                SafeRegionType.Input("region_1", tooltip="A safe region, from Load Safe Region or Train Safe Region."),
                SafeRegionType.Input("region_2", tooltip="Another one, learned with the same text encoder."),
                SafeRegionType.Input("region_3", optional=True, tooltip="A third one, if there is one."),
                SafeRegionType.Input("region_4", optional=True, tooltip="A fourth one, if there is one."),
            ],
            outputs=[
                SafeRegionType.Output(
                    display_name="region", tooltip="All of them as one, for Apply, Guard Model or Save Safe Region."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, region_1: Region, region_2: Region, region_3: Region | None = None, region_4: Region | None = None
    ) -> io.NodeOutput:
        regions = [region for region in (region_1, region_2, region_3, region_4) if region is not None]
        check_together(regions)
        return io.NodeOutput(combine(*regions))
