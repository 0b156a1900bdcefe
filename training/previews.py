"""The pictures that a run makes while it learns: those it sends to whoever watches, and the one its region carries."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

from PIL import Image
from torch import Tensor

from ..region.region import Region

MOST_PREVIEW = 20_000  # bytes of the picture in a region's metadata, as text


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 to a Pillow image."""
    array = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def mosaic(rows: Sequence[Sequence[Image.Image]], size: int = 128, gap: int = 4) -> Image.Image:
    """Rows of pictures, all as many."""
    cell = size + gap
    made = Image.new("RGB", (len(rows[0]) * cell - gap, len(rows) * cell - gap), "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            made.paste(picture.resize((size, size)), (x * cell, y * cell))
    return made


def jpeg_text(image: Image.Image, most: int) -> str:
    """A JPEG in base64 of at most that many characters, as good and as large as that allows."""
    for quality in (90, 75, 50, 30):
        content = BytesIO()
        image.convert("RGB").save(content, "JPEG", quality=quality)
        text = base64.b64encode(content.getvalue()).decode()
        if len(text) <= most:
            return text
    return jpeg_text(image.resize((image.width // 2, image.height // 2)), most)


def with_preview(region: Region, rows: Sequence[tuple[str, Image.Image, Image.Image]]) -> Region:
    """The region with a small picture in its metadata: what two prompts draw without it, and to the right with it."""
    small = jpeg_text(mosaic([(before, after) for _, before, after in rows[:2]], 126), MOST_PREVIEW)
    return replace(region, metadata=region.metadata | {"preview": small})
