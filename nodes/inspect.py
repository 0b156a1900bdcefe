"""Looking at what a region does to a prompt: the heat strip."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Generator

from ..backbones.comfy import ComfyBackbone
from ..backbones.sampling import trajectory
from ..demo.text import unknown_words
from ..evaluation.heat import Strip, heat_strip, report
from ..region import Region
from ..region.conditioning import Entry, original_tensors, text_tensors, with_blocks
from ..region.inspection import inspect_entry, judge
from ..reports.strip import stacked, strip_picture
from ..training.previews import to_image
from .belonging import check_encoder
from .common import SafeRegionType, gate_outputs, gate_ui, gate_values, picture_tensor, schema, steering_inputs
from .demo import DemoClipTokenizer
from .steering_status import doubts
from .words import places, readings, same_places

MOST_PROMPTS = 8  # that are shown, of a conditioning with many entries or a batch
SMALL_MODEL = 256 * 1024**2  # bytes of weights up to which `auto` draws: it takes no longer than a moment
STEPS, GUIDANCE, SEED = 12, 4.0, 0


class SafeRegionInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SafeRegionInspect",
            display_name="Inspect Safe Region",
            description="Shows what a region does to a prompt, word by word: how far each lies outside, how far it is "
            "moved, and which wall it was. With a small model and its VAE it also draws the prompt before and after.",
            search_aliases=["safe region", "heat strip", "heatmap", "heat map", "explain", "debug", "inspect prompt",
                            "why"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the region was learned for."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt to look at."),
                SafeRegionType.Input("region", tooltip="The safe region, from Load Safe Region or Train Safe Region."),
                *steering_inputs()[:2],
                io.Model.Input("model", optional=True, tooltip="With the VAE: for pictures before and after."),
                io.Vae.Input("vae", optional=True, tooltip="With the model: for pictures before and after."),
                io.Combo.Input(
                    "draw", options=["auto", "always", "never"], default="auto", optional=True,
                    tooltip="Pictures before and after, of one seed and few steps. auto: with small models such as "
                    "the demo model, where it takes a moment. always: with any model.",
                ),
                io.Conditioning.Input(
                    "conditioning", optional=True,
                    tooltip="Look at this instead of the text, when other nodes made the prompt. Where it holds the "
                    "text's own tokens they are shown as words, and as numbers elsewhere.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="strip", tooltip="The heat strip as a picture, for sharing."),
                io.String.Output(display_name="report", tooltip="The same as text."),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The prompt as the region leaves it, for the sampler."
                ),
                *gate_outputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip: Any, text: str, region: Region, strength: float = 1.0, mode: str = "auto", model: Any = None,
        vae: Any = None, draw: str = "auto", conditioning: list[Any] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise ValueError("There is no text encoder: the checkpoint has none of its own. Load one with Load CLIP.")
        check_encoder(region, clip)
        encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        ours = text_tensors(encoded[0])
        known = places(readings(clip, text), ours)
        unknown = unknown_words if isinstance(clip.tokenizer, DemoClipTokenizer) else None
        entries = encoded if conditioning is None else conditioning
        strips: list[Strip] = []
        steered: list[Entry] = []
        for entry in entries:
            found, changed = inspect_entry(entry, region, strength, mode)
            steered += changed
            tokens = same_places(known, ours, original_tensors(entry))
            strips += [heat_strip(one, tokens, text, region.name, strength, unknown)
                       for one in found[: MOST_PROMPTS - len(strips)]]  # fmt: skip
        drawn = _drawn(clip, model, vae, draw, entries[:1], steered[:1])
        sheets = [strip_picture(strip, drawn if i == 0 else ()) for i, strip in enumerate(strips)]
        told = "\n\n".join([*map(report, strips), *(line for line, _ in doubts(region))])
        seen = [strip.plain() for strip in strips]
        if seen and drawn:
            files = ui.PreviewImage(torch.cat([picture_tensor(one) for _, one in drawn]), cls=cls).as_dict()["images"]
            seen[0]["pictures"] = [{**dict(file), "caption": caption} for (caption, _), file in zip(drawn, files)]
        picture = picture_tensor(stacked(sheets) if sheets else Image.new("RGB", (8, 8)))
        judged = judge(entries, region)
        return io.NodeOutput(picture, told, steered, *gate_values(judged),
                             ui={"safe_region_strip": seen, "text": [told], **gate_ui(judged)})  # fmt: skip


def _drawn(
    clip: Any, model: Any, vae: Any, draw: str, before: Sequence[Entry], after: Sequence[Entry]
) -> list[tuple[str, Image.Image]]:
    """The prompt before and after with captions; one picture where nothing is moved, none where none is wanted."""
    small = draw == "auto" and model is not None and model.model_size() <= SMALL_MODEL
    if model is None or vae is None or not before or len(before[0][0]) > 1 or not (small or draw == "always"):
        return []
    original = with_blocks(before[0], original_tensors(before[0]))
    texts = [text_tensors(entry) for entry in (original, after[0])]
    same = all(texts[0][name] is tensor or torch.equal(texts[0][name], tensor) for name, tensor in texts[1].items())
    rows = [("the same with and without", original)] if same else [("without", original), ("with the region", after[0])]
    bar = comfy.utils.ProgressBar(STEPS * len(rows))
    backbone = ComfyBackbone(model, clip, vae)
    pictures = []
    with torch.inference_mode(False), torch.no_grad():
        empty = backbone.encode([""])[0]
        for caption, (tensor, options) in rows:
            options = {name: value for name, value in options.items() if name != "hooks"}
            walk = trajectory(backbone, [[tensor, options]], empty, GUIDANCE, STEPS, Generator().manual_seed(SEED),
                              visit=lambda step: bar.update(1))  # fmt: skip
            ((_, _, denoised),) = deque(walk, maxlen=1)
            pictures.append((caption, to_image(backbone.decode(denoised)[0])))
    return pictures
