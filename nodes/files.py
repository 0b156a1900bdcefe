"""Loading and saving regions."""
from __future__ import annotations

from dataclasses import replace
from datetime import date

import torch
from comfy_api.latest import io, ui

from ..region import Region, RegionError, load_region, save_region
from .common import SafeRegionType, schema, show_text
from .folders import region_names, region_path, save_folder
from .names import free_path, safe_name, shown


def missing(name: str | None) -> str:
    """One sentence for a region that is not there."""
    which = f'There is no region "{shown(name, 120)}"' if name else "No region is chosen"
    return (
        f"{which}: train one with Train Safe Region and Save Safe Region, or put its .safetensors file into "
        f"{save_folder()} and press R."
    )


def card(region: Region) -> str:
    """What a region says about itself, in a few short lines."""
    data = region.metadata
    lines = [shown(region.name, 80)]
    if data.get("description"):
        lines.append(shown(data["description"], 160))
    encoder = data.get("encoder")
    if isinstance(encoder, dict) and encoder.get("name"):
        lines.append(f"learned on {shown(encoder['name'], 80)}")
    calibration = data.get("calibration")
    if isinstance(calibration, dict) and isinstance(calibration.get("bound"), float):
        lines.append(f"touches at most {calibration['bound']:.1%} of harmless prompts like those it was calibrated on")
    elif not all(part.gates for part in region.parts):
        lines.append("acts on every prompt")
    return "\n".join(lines)


class SafeRegionLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionLoader",
            display_name="Load Safe Region",
            description="Loads a safe region from models/safe_regions. A missing or damaged file stops the workflow: "
            "nothing is ever drawn unguarded in silence.",
            search_aliases=["safe region", "safety", "load region"],
            inputs=[
                io.Combo.Input(
                    "region_name", options=region_names(),
                    tooltip="A .safetensors file in models/safe_regions, or an example that comes with the pack.",
                ),
            ],
            outputs=[SafeRegionType.Output(display_name="region", tooltip="The safe region, for Apply Safe Region.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, region_name: str | None = None) -> bool | str:
        return True if region_path(region_name or "") else missing(region_name)

    @classmethod
    def fingerprint_inputs(cls, region_name: str | None = None) -> str:
        path = region_path(region_name or "")
        status = path.stat() if path else None
        return f"{status.st_mtime_ns} {status.st_size}" if status else "missing"

    @classmethod
    def execute(cls, region_name: str) -> io.NodeOutput:
        path = region_path(region_name)
        if path is None:
            raise RegionError(missing(region_name))
        with torch.inference_mode(False):  # training may go on from it later
            region = load_region(path)
        show_text(cls.hidden.unique_id, card(region))
        return io.NodeOutput(region, ui=ui.PreviewText(card(region)))


def described(region: Region, name: str, texts: dict[str, str]) -> Region:
    """The region with a new name and whichever of the texts are not empty."""
    given = {key: text.strip() for key, text in texts.items() if text.strip()}
    created = {"created": region.metadata.get("created") or date.today().isoformat()}
    return replace(region, metadata={**region.metadata, **created, "name": name, **given})


class SaveSafeRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SaveSafeRegion",
            display_name="Save Safe Region",
            description="Saves a safe region into models/safe_regions, where Load Safe Region finds it (press R to "
            "refresh its list).",
            search_aliases=["safe region", "save region"],
            is_output_node=True,
            inputs=[
                SafeRegionType.Input("region", tooltip="The region to save, from Train Safe Region."),
                io.String.Input(
                    "name", default="my-region", optional=True,
                    tooltip="File name without ending; / makes a folder. When it exists, a number is added.",
                ),
                io.String.Input(
                    "author", default="", optional=True, tooltip="Who made it; written into the file."
                ),
                io.String.Input("license", default="", optional=True, tooltip="Its licence, for example CC0-1.0."),
                io.String.Input(
                    "description", default="", multiline=True, optional=True,
                    tooltip="What it keeps out, and where its limits are; shown when it is loaded.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, optional=True, tooltip="Replace a file of the same name."
                ),
            ],
            outputs=[
                SafeRegionType.Output(display_name="region", tooltip="The same region, with its new name and texts."),
                io.String.Output(display_name="path", tooltip="Where the file lies."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, region: Region, name: str = "my-region", author: str = "", license: str = "", description: str = "",
        overwrite: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        clean = safe_name(name) or safe_name(region.name)
        if not clean:
            raise RegionError(f'"{name}" leaves no usable file name: use letters and digits.')
        texts = {"author": author, "licence": license, "description": description}
        region = described(region, clean.rsplit("/", 1)[-1], texts)
        path = free_path(save_folder(), clean, overwrite)
        try:
            save_region(region, path)
        except OSError as error:
            raise RegionError(f"{path} cannot be written: {error.strerror or error}.") from None
        message = f"saved: {path}"
        show_text(cls.hidden.unique_id, shown(message, 1000))
        return io.NodeOutput(region, str(path), ui=ui.PreviewText(message))


NODES = [SafeRegionLoader, SaveSafeRegion]
