"""Balancing an attribute over the images of a batch, and learning the region for it."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..backbones.comfy import ComfyBackbone
from ..region import Region, attribute_of, balance_conditioning, parse_shares
from ..region.balance import known_groups
from ..region.conditioning import MAX_STRENGTH
from ..training.attribute_trainer import CONTRAST, AttributeTrainer
from ..training.attributes import AttributePairs, load_attribute, parse_attribute
from ..training.packs import attribute_pack_names, load_attribute_pack
from ..training.pairs import PairsError
from .common import LossMapType, SafeRegionType, advanced, schema, status
from .names import file_state
from .pairs import NO_FILE, no_file, pair_files, pair_path
from .steering_status import doubts
from .train import finished, recipe_from

TEXT = ".txt"
EXAMPLE = """\
# One row a line: open prompt => group: prompt => group: prompt. {a|b} writes several rows at once, in step everywhere.
attribute: gender
a photo of a {doctor|judge|teacher|pilot|nurse|cook} => man: a photo of a male {doctor|judge|teacher|pilot|nurse|cook} \
=> woman: a photo of a female {doctor|judge|teacher|pilot|nurse|cook}
portrait of a {scientist|farmer|lawyer|singer} at work => man: portrait of a man, {scientist|farmer|lawyer|singer} at \
work => woman: portrait of a woman, {scientist|farmer|lawyer|singer} at work
# Prompts that state it some other way, and prompts about other things, must stay as they are:
stated: a {doctor|judge|singer} who is a {man|woman}
keep: a {cat|dog|tree|house} in the park
"""


class SafeRegionBalance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionBalance",
            display_name="Balance Safe Region (Bias)",
            description="Gives each image of a batch a group of an attribute (a gender, for instance) in the shares "
            "you want: of 8 images at 50/50 exactly 4 and 4. Prompts that state the attribute, or are about something "
            "else, come out unchanged. Place it between CLIP Text Encode and the sampler's positive input.",
            search_aliases=[
                "safe region", "fair", "fairness", "bias", "debias", "balance", "diverse", "diversity", "gender",
                "inclusive", "representation", "stereotype", "skin tone", "age",
            ],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, from CLIP Text Encode or any other node."),
                SafeRegionType.Input(
                    "region", tooltip="The attribute's region, from Load Safe Region or Train Balance Region."
                ),
                io.Int.Input(
                    "batch_size", default=8, min=1, max=4096,
                    tooltip="How many images are drawn at once: the batch size of the latent image. Connect that to "
                    "the input latent, and it is read from there.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Says which image gets which group. Incremented from run to run, the totals over all runs "
                    "keep to the shares too, with single images as well.",
                ),
                io.String.Input(
                    "shares", default="", optional=True,
                    tooltip="The target shares, such as man: 50, woman: 50. They need not add up to 100. Empty takes "
                    "the region's own.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05, optional=True,
                    tooltip="How far a prompt is moved: 1 is what was learned, 0 changes nothing.",
                ),
                advanced(
                    io.Float, "start", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="Share of sampling after which the groups act. 0 is from the first step on; a later start "
                    "keeps more of the layout and balances less.",
                ),
                advanced(
                    io.Float, "end", default=1.0, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="Share of sampling after which the groups no longer act. 1 is to the last step.",
                ),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="The latent image that goes to the sampler: its batch size then counts, and the number "
                    "above does not.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The prompt, with a row for each image, for the sampler."
                ),
                io.String.Output(display_name="groups", tooltip="Which image was given which group, by its number."),
            ],
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, conditioning: list[Any], region: Region, batch_size: int, seed: int, shares: str = "",
        strength: float = 1.0, start: float = 0.0, end: float = 1.0, latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        attribute = attribute_of(region)
        if latent is not None:
            batch_size = len(latent["samples"])
        wanted = parse_shares(shares, list(attribute.groups))
        balanced = balance_conditioning(conditioning, region, batch_size, seed, wanted, strength, start, end)
        drawn = known_groups(balanced, batch_size).get(attribute.name, [])
        text = ", ".join(f"{number} {group}" for number, group in enumerate(drawn, 1)) or "nothing is changed"
        return io.NodeOutput(balanced, text, ui=status([(text, "neutral"), *doubts(region)]))


class TrainBalanceRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TrainBalanceRegion",
            display_name="Train Balance Region",
            description="Learns a region that balances an attribute (a gender, an age, a place) with this model, from "
            "prompts that leave it open and the same prompts for each group. The model itself is not changed. "
            "Interrupting keeps what was learned so far in models/safe_regions/interrupted.",
            search_aliases=[
                "safe region", "train region", "fairness", "bias", "debias", "diversity", *attribute_pack_names(),
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to learn the region with; any that can sample."),
                io.Clip.Input("clip", tooltip="Its text encoder: the region fits this encoder only."),
                io.String.Input(
                    "text", multiline=True, default=EXAMPLE,
                    tooltip="One row a line: open prompt => group: prompt => group: prompt. A line attribute: names "
                    "it; lines with stated: and keep: are prompts that must not change; # begins a comment.",
                ),
                io.Combo.Input(
                    "file", options=[NO_FILE, *text_files()], default=NO_FILE, optional=True,
                    tooltip="A .txt file in ComfyUI's input folder, a pack of your own, to read instead of the text "
                    "box.",
                ),
                io.Combo.Input(
                    "preset", options=["region", "instant", "paper"], default="region", optional=True,
                    tooltip="region: gates and moves, learned through the model. instant: a minute, from the text "
                    "encoder alone. paper: one direction for each group, as in the WWW 2025 paper; it changes every "
                    "prompt.",
                ),
                io.Int.Input(
                    "steps", display_name="steps (0: auto)", default=0, min=0, max=100_000, optional=True,
                    tooltip="Training steps for each group; 0 is the preset's own number.",
                ),
                advanced(
                    io.Float, "contrast", default=CONTRAST, min=0.0, max=20.0, step=0.5, optional=True,
                    tooltip="How far a group's pictures are set apart from those of the others. 0 learns what the "
                    "model draws for the group's prompt; raise it for a model that hardly heeds the word for a group.",
                ),
                advanced(
                    io.Int, "size", display_name="size (0: auto)", default=0, min=0, max=2048, step=8, optional=True,
                    tooltip="Width and height in pixels of the pictures that training imagines; 0 is automatic "
                    "(512, or the model's own).",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFF, control_after_generate=True, optional=True,
                    tooltip="The same seed and inputs give the same region, from the cache. Another one trains anew: "
                    "leave control after generate on fixed.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For pictures before and after in the report."),
                io.Combo.Input(
                    "pack", options=[NO_FILE, *attribute_pack_names()], default=NO_FILE, optional=True,
                    tooltip="A built-in pack for an attribute, read instead of the text box and the file.",
                ),
            ],
            outputs=[
                SafeRegionType.Output(display_name="region", tooltip="The region, for Balance or Save Safe Region."),
                LossMapType.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph."),
                io.Image.Output(display_name="report", tooltip="Loss, distances and pictures before and after."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str | None = NO_FILE) -> bool | str:
        return True if file in (None, NO_FILE) or text_path(file) else no_file(file, TEXT)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = NO_FILE, **others: Any) -> str:
        return file_state(text_path(file or NO_FILE))

    @classmethod
    def execute(
        cls, model: Any, clip: Any, text: str, file: str = NO_FILE, preset: str = "region", steps: int = 0,
        contrast: float = CONTRAST, size: int = 0, seed: int = 0, vae: Any = None, pack: str = NO_FILE,
    ) -> io.NodeOutput:  # fmt: skip
        pairs = rows_from(text, file, pack)
        recipe = recipe_from(preset, seed, steps=steps)
        with torch.inference_mode(False), torch.enable_grad():  # ComfyUI runs nodes in inference mode
            trainer = AttributeTrainer(ComfyBackbone(model, clip, vae, size), pairs, recipe, contrast)
            return finished(cls, trainer, model)


def rows_from(text: str, file: str, pack: str) -> AttributePairs:
    """The rows of a pack, or of a file, or of the text box. Raises PairsError."""
    if pack != NO_FILE:
        return load_attribute_pack(pack)
    if file in (None, NO_FILE):
        return parse_attribute(text)
    path = text_path(file)
    if path is None:
        raise PairsError(no_file(file, TEXT))
    return load_attribute(path)


def text_files() -> list[str]:
    """Text files in ComfyUI's input folder."""
    return [name for name in pair_files() if name.lower().endswith(TEXT)]


def text_path(name: object) -> Path | None:
    """The text file of that name in the input folder, or None."""
    return pair_path(name) if str(name).lower().endswith(TEXT) else None
