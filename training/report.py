"""Pictures of a training run, drawn with Pillow: loss curve, depths, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

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


def row(images: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Images side by side."""
    sheet = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), PAPER)
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + gap
    return sheet


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
    if depths is None:
        return
    finite = [d[torch.isfinite(d)].float().cpu() for d in depths]
    if not any(len(d) for d in finite):
        return
    low = min(float(d.min()) for d in finite if len(d))
    high = max(float(d.max()) for d in finite if len(d))
    low, high = min(low, -0.1), max(high, 0.1)
    for values, colour in zip(finite, (SAFE, UNSAFE)):
        if len(values):
            counts = torch.histc(values, 48, low, high)
            counts = counts / counts.max()
            for i, count in enumerate(counts.tolist()):
                x = left + (right - left) * (i + 0.5) / 48
                draw.line((x, bottom, x, bottom - (bottom - top) * 0.9 * count), fill=colour, width=3)
    zero = left + (right - left) * -low / (high - low)
    draw.line((zero, top, zero, bottom), fill=INK)
    draw.text((zero + 4, top + 2), "wall", INK, font(10))


def of_new_words(depths: Tensor) -> dict[str, float | int]:
    """What a run's numbers say about held-out prompts [N], whose words it did not learn from, by their depth."""
    return {"held_out_words": len(depths), "held_out_words_touched": float((depths > 0).float().mean())}


def summary(numbers: dict[str, Any]) -> list[str]:
    """What a run can say about itself, in a few words a line."""
    lines = [f"learned in {numbers['seconds']:.0f} s"] if "seconds" in numbers else []
    found = numbers.get("calibration")
    if found:
        lines += [
            f"touches {found['harmless_touched']:.1%} of {found['harmless_prompts']} held-out harmless prompts",
            f"and {found['held_out_unsafe_touched']:.1%} of held-out unsafe prompts",
        ]
        if "held_out_words" in found:
            lines.append(f"and {found['held_out_words_touched']:.1%} of {found['held_out_words']} with new words")
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
