"""What all nodes share: the category, the schema helper, custom types and what is said on a node."""
from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from ..region.conditioning import MAX_STRENGTH
from ..region.inspection import Judgement
from .names import shown

SafeRegionType = io.Custom("SAFE_REGION")
PromptPairsType = io.Custom("PROMPT_PAIRS")
LossMapType = io.Custom("LOSS_MAP")  # core's own type, so that its Plot Loss Graph draws our losses
# What people type into the node search who want to keep something out of their pictures.
KEEP_OUT = (
    "safe region", "safety", "nsfw", "sfw", "nude", "nudity", "naked", "porn", "pornography", "adult", "adult content",
    "gore", "violence", "censor", "censorship", "filter", "content filter", "nsfw filter", "safety filter",
    "safety checker", "moderation", "content moderation", "kids", "kid safe", "kid friendly", "child safe", "parental",
    "parental control", "family friendly", "block", "forbid", "forbidden",
)  # fmt: skip


def schema(**fields: Any) -> io.Schema:
    """A node's schema in our category; fields that this ComfyUI is too old to know are left out."""
    known = io.Schema.__dataclass_fields__
    return io.Schema(category=category(), **{name: value for name, value in fields.items() if name in known})


def category() -> str:
    """Ours, beside ComfyUI's own nodes for prompts, which have moved from "conditioning" to "model/conditioning"."""
    core = getattr(sys.modules.get("nodes"), "CLIPTextEncode", None)  # ComfyUI's own module, which loads us
    return f"{getattr(core, 'CATEGORY', 'conditioning')}/safe region"


def advanced(kind: Any, *args: Any, **fields: Any) -> Any:
    """An input of this kind that few need: behind "show advanced inputs", where this ComfyUI has that."""
    known = "advanced" in inspect.signature(kind.Input).parameters
    return kind.Input(*args, **fields, **({"advanced": True} if known else {}))


def steering_inputs() -> list[Any]:
    """How strongly, for which prompts and when a region acts, in the order of `apply_to_conditioning`'s arguments."""
    return [
        io.Float.Input(
            "strength", default=1.0, min=0.0, max=MAX_STRENGTH, step=0.05, optional=True,
            tooltip="How far an unsafe prompt is moved: 1 is what was learned, 0 changes nothing.",
        ),
        io.Combo.Input(
            "mode", options=["auto", "gated", "always"], default="auto", optional=True,
            tooltip="auto: move only prompts outside of the region, if the region can tell. gated: the same, "
            "but refuse a region that cannot tell. always: move every prompt.",
        ),
        advanced(
            io.Float, "start", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="Share of sampling after which the region acts. 0 is from the first step on; a later start "
            "keeps more of the layout and removes less.",
        ),
        advanced(
            io.Float, "end", default=1.0, min=0.0, max=1.0, step=0.01, optional=True,
            tooltip="Share of sampling after which the region no longer acts. 1 is to the last step; an earlier end "
            "lets the rest of sampling draw the original prompt.",
        ),
        advanced(
            io.Combo, "unknown_text", options=["refuse", "allow"], default="refuse", optional=True,
            tooltip="What to do where another node or model adds something to the prompt that may be text and that "
            "Safe Region does not know. refuse: stop and say its name. allow: go on, and that text reaches the model "
            "unguarded.",
        ),
    ]  # fmt: skip


def gate_outputs() -> list[Any]:
    """What a region's gates say, one item for each row of a prompt's batch; `gate_values` has what comes out."""
    return [
        io.Boolean.Output(
            display_name="opened", is_output_list=True,
            tooltip="Whether the prompt lies outside of the region, whatever strength and mode make of that. True, "
            "too, where it cannot be told.",
        ),
        io.Float.Output(
            display_name="depth", is_output_list=True,
            tooltip="How far outside it lies: above 0 outside, from 1 on clearly so. 1000 where it cannot be told, "
            "-1000 for a prompt without words.",
        ),
        io.String.Output(
            display_name="concepts", is_output_list=True,
            tooltip="The concepts that see it outside, with commas between them. Empty inside.",
        ),
    ]  # fmt: skip


def gate_values(judged: Sequence[Judgement]) -> tuple[list[bool], list[float], list[str]]:
    return [row.opened for row in judged], [row.depth for row in judged], [", ".join(row.concepts) for row in judged]


def gate_rows(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The same for those who read a run's history: docs/nodes.md tells them."""
    return [{"opened": row.opened, "depth": row.depth, "concepts": list(row.concepts)} for row in judged]


def gate_ui(judged: Sequence[Judgement]) -> dict[str, Any]:
    return {"safe_region_gate": gate_rows(judged)}


def prompt_server() -> Any:
    """ComfyUI's server, or None (in tests)."""
    try:
        from server import PromptServer
    except ImportError:
        return None
    return getattr(PromptServer, "instance", None)


def status(lines: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """UI output that web/js/status.js shows on the node: lines, each with its tone (good, warn, bad or neutral)."""
    return {"text": [shown(text, 1000) for text, _ in lines], "safe_region_tone": [tone for _, tone in lines]}


def send_event(name: str, detail: dict[str, Any]) -> None:
    """Tell the page that started the run; without a server (in tests) nothing happens."""
    server = prompt_server()
    if server is not None:
        server.send_sync(name, detail, server.client_id)


def picture_tensor(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
