"""Pictures of a training run, drawn with Pillow: loss curve, depths, before and after."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..region.region import Region
from .progress import separation

MOST_PREVIEW = 20_000  # bytes of the picture in a region's metadata, as text
INK, FAINT, SAFE, UNSAFE, PAPER = "#22262b", "#c9ced6", "#2f9e6e", "#d1495b", "#ffffff"


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 to a Pillow image."""
    array = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow image as ComfyUI's IMAGE [1, H, W, 3] in 0..1."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.reshape(1, image.height, image.width, 3).float() / 255


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def shorten(text: str, draw: ImageDraw.ImageDraw, width: int, size: int) -> str:
    """The text, cut with an ellipsis to a width in pixels."""
    if draw.textlength(text, font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", font(size)) > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, draw: ImageDraw.ImageDraw, width: int, size: int) -> str:
    """The text in at most two lines of a width in pixels."""
    words = text.split(" ")
    first = max((n for n in range(1, len(words) + 1) if draw.textlength(" ".join(words[:n]), font(size)) <= width),
                default=1)  # fmt: skip
    rest = " ".join(words[first:])
    return "\n".join(shorten(line, draw, width, size) for line in (" ".join(words[:first]), rest) if line)


def mosaic(rows: Sequence[Sequence[Image.Image]], size: int = 128, gap: int = 4) -> Image.Image:
    """Rows of pictures, all as many."""
    cell = size + gap
    made = Image.new("RGB", (len(rows[0]) * cell - gap, len(rows) * cell - gap), PAPER)
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


def captioned(pictures: Sequence[tuple[str, Image.Image]], columns: int = 8, size: int = 128) -> Image.Image:
    """A grid of pictures, each below its prompt."""
    cell, high, lines = size + 8, size + 36, -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell + 8, lines * high + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(pictures):
        x, y = 8 + (i % columns) * cell, 6 + (i // columns) * high
        draw.multiline_text((x, y), wrapped(prompt, draw, size, 11), INK, font(11), spacing=2)
        sheet.paste(picture.resize((size, size)), (x, y + 32))
    return sheet


def before_after(
    rows: Sequence[tuple[str, Image.Image, Image.Image]], columns: int = 4, size: int = 128
) -> Image.Image:
    """A grid of prompts with the picture drawn without and with the region."""
    cell_w, cell_h = 2 * size + 18, size + 62
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_w + 6, lines * cell_h + 6), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, before, after) in enumerate(rows):
        x, y = 10 + (i % columns) * cell_w, (i // columns) * cell_h + 6
        draw.multiline_text((x, y), wrapped(prompt, draw, 2 * size, 12), INK, font(12), spacing=2)
        sheet.paste(before.resize((size, size)), (x, y + 34))
        sheet.paste(after.resize((size, size)), (x + size + 4, y + 34))
        draw.text((x, y + 36 + size), "without", INK, font(10))
        draw.text((x + size + 4, y + 36 + size), "with the region", SAFE, font(10))
    return sheet


def _curve(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], values: Sequence[float]) -> None:
    left, top, right, bottom = box
    draw.text((left, top - 20), "loss: share of the unsafe picture left", INK, font(12))
    draw.rectangle(box, outline=FAINT)
    if not values:
        return
    window = max(1, len(values) // 40)
    smooth = [sum(values[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(values))]
    high = max(max(smooth), 1e-9)
    points = [
        (left + (right - left) * i / max(1, len(smooth) - 1), bottom - (bottom - top) * 0.95 * value / high)
        for i, value in enumerate(smooth)
    ]
    if len(points) > 1:
        draw.line(points, fill=SAFE, width=2)
    draw.text((left + 4, top + 2), f"{high:.3g}", FAINT, font(10))
    draw.text((right - 110, bottom - 16), f"last {smooth[-1]:.3g}, {len(values)} steps", INK, font(10))


def _histogram(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], depths: tuple[Tensor, Tensor] | None) -> None:
    left, top, right, bottom = box
    draw.text((left, top - 20), "depth beyond the walls: harmless and unsafe prompts, both held out", INK, font(12))
    draw.rectangle(box, outline=FAINT)
    found = separation(*depths) if depths else None
    if found is None:
        return
    low, high = found.low, found.high
    for counts, colour in zip(found.counts, (SAFE, UNSAFE)):
        for i, count in enumerate(counts):
            x = left + (right - left) * (i + 0.5) / len(counts)
            draw.line((x, bottom, x, bottom - (bottom - top) * 0.9 * count / max(1, *counts)), fill=colour, width=3)
    zero = left + (right - left) * -low / (high - low)
    draw.line((zero, top, zero, bottom), fill=INK)
    draw.text((zero + 4, top + 2), "wall", INK, font(10))


def summary(numbers: dict[str, Any]) -> list[str]:
    """What a run can say about itself, in a few words a line."""
    lines = [f"learned in {numbers['seconds']:.0f} s"] if "seconds" in numbers else []
    found = numbers.get("calibration")
    if found:
        lines += [
            f"touches {found['harmless_touched']:.1%} of {found['harmless_prompts']} held-out harmless prompts",
            f"and {found['held_out_unsafe_touched']:.1%} of held-out unsafe prompts",
        ]
    return lines


def picture(
    title: str,
    losses: Sequence[float],
    depths: tuple[Tensor, Tensor] | None,
    rows: Sequence[tuple[str, Image.Image, Image.Image]],
    numbers: dict[str, Any],
) -> Image.Image:
    """The report of one training run."""
    grid = before_after(rows, 3) if rows else None
    width = max(860, grid.width if grid else 0)
    sheet = Image.new("RGB", (width, 300 + (grid.height if grid else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), f"Safe region: {title}", INK, font(20))
    draw.text((12, 34), ", ".join(summary(numbers)), INK, font(12))
    _curve(draw, (12, 80, width // 2 - 10, 280), losses)
    _histogram(draw, (width // 2 + 10, 80, width - 12, 280), depths)
    if grid:
        sheet.paste(grid, (0, 296))
    return sheet
