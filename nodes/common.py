"""What all nodes share: the category, the schema helper, custom types and text on a node."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

CATEGORY = "conditioning/safe region"
SafeRegionType = io.Custom("SAFE_REGION")
PromptPairsType = io.Custom("PROMPT_PAIRS")
LossMapType = io.Custom("LOSS_MAP")  # core's own type, so that its Plot Loss Graph draws our losses


def schema(**fields: Any) -> io.Schema:
    """A node's schema in our category; fields that this ComfyUI is too old to know are left out."""
    known = io.Schema.__dataclass_fields__
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in known})


def show_text(node_id: str | None, text: str) -> None:
    """Show a line of text on a node while it runs; web/js/status.js keeps the `text` of its UI output there later.

    Without a server (in tests) nothing happens.
    """
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def picture_tensor(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
