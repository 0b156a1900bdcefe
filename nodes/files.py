"""Loading and saving regions."""
from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..region import Region, RegionError, region_bytes, region_from_bytes
from ..region.files import write_new
from .cards import card_text, chosen_content, origin, region_card, standing
from .common import SafeRegionType, schema, status
from .folders import FOLDER, region_path, save_folder
from .listing import region_names
from .names import SUFFIX, default_name, file_state, safe_name, shown
from .steering_status import doubts

# Text for the server and for tools that read workflows; in the page the card's own widget, without a socket.
CarriedType = io.Custom("STRING")


class SafeRegionLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionLoader",
            display_name="Load Safe Region",
            description="Loads a safe region from models/safe_regions. A missing or damaged file stops the workflow: "
            "nothing is ever drawn unguarded in silence.",
            search_aliases=["safe region", "load region", "open region", "shared region"],
            inputs=[
                io.Combo.Input(
                    "region_name", options=region_names(),
                    tooltip="A .safetensors file in models/safe_regions, or an example that comes with the pack.",
                ),
                CarriedType.Input(
                    "carried", optional=True,
                    tooltip="What this workflow knows about its region: the hash and source of the file, and with "
                    "Embed in workflow the file itself. The card on the node fills it in.",
                    extra_dict={"default": "", "widgetType": "SAFE_REGION_CARRIED", "socketless": True, "hidden": True},
                ),
            ],
            outputs=[SafeRegionType.Output(display_name="region", tooltip="The safe region, for Apply Safe Region.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, region_name: str | None = None, carried: str | None = "") -> bool | str:
        if region_name is None or carried is None:  # one is linked: looked at when it runs
            return True
        found = standing(region_name, carried, region_path, save_folder())
        return found.runs or found.message

    @classmethod
    def fingerprint_inputs(cls, region_name: str | None = None, **others: Any) -> str:
        return file_state(region_path(region_name or ""))

    @classmethod
    def execute(cls, region_name: str, carried: str = "") -> io.NodeOutput:
        content = chosen_content(region_name, carried, region_path, save_folder())
        with torch.inference_mode(False):  # training may go on from it later
            region = region_from_bytes(content, shown(region_name, 80))
        told = [origin(region_name, carried, region_path), card_text(region_card(region, content, region_name))]
        return io.NodeOutput(region, ui=ui.PreviewText("\n".join(filter(None, told))))


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
            search_aliases=["safe region", "save region", "export region", "share region"],
            is_output_node=True,
            inputs=[
                SafeRegionType.Input("region", tooltip="The region to save, from Train Safe Region."),
                io.String.Input(
                    "name", default="", optional=True,
                    tooltip="File name without ending; / makes a folder. Empty takes the concept and the model, as in "
                    "weapons.sdxl. When it exists, a number is added.",
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
                io.String.Input(
                    "source", default="", optional=True,
                    tooltip="Where others find this file: a page or an address. Shown as text to whoever lacks it.",
                ),
            ],
            outputs=[
                SafeRegionType.Output(display_name="region", tooltip="The same region, with its new name and texts."),
                io.String.Output(display_name="path", tooltip="Where the file lies."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, region: Region, name: str = "", author: str = "", license: str = "", description: str = "",
        overwrite: bool = False, source: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        clean = safe_name(name)
        if name.strip() and not clean:
            raise RegionError(f'"{shown(name, 80)}" leaves no usable file name: use letters and digits.')
        texts = {"author": author, "licence": license, "description": description, "source": source}
        region = described(region, clean.rsplit("/", 1)[-1] or region.name, texts)
        name, folder = clean or default_name(region), save_folder()
        try:
            path = write_new(folder, name, region_bytes(region), overwrite)
        except OSError as error:
            raise RegionError(
                f"models/{FOLDER}/{name}{SUFFIX} cannot be written: {error.strerror or error}."
            ) from None
        listed = path.relative_to(folder).as_posix()
        told = [(f"Saved: models/{FOLDER}/{listed}", "good"), *doubts(region)]
        return io.NodeOutput(region, str(path), ui=status(told))
