"""What the pictures share: colours, grids of pictures with their prompts, and their file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from ..region.writing import write_atomically
from .lettering import font, wrapped, write

INK, PALE, FAINT, SAFE, UNSAFE, PAPER = "#22262b", "#6b7280", "#c9ced6", "#2f9e6e", "#d1495b", "#ffffff"


def captioned(pictures: Sequence[tuple[str, Image.Image]], columns: int = 8, size: int = 128) -> Image.Image:
    """A grid of pictures, each below its prompt."""
    cell, high, lines = size + 8, size + 36, -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell + 8, lines * high + 8), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, picture) in enumerate(pictures):
        x, y = 8 + (i % columns) * cell, 6 + (i // columns) * high
        write(draw, (x, y), wrapped(prompt, size, 11), INK, 11)
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
        write(draw, (x, y), wrapped(prompt, 2 * size, 12), INK, 12)
        sheet.paste(before.resize((size, size)), (x, y + 34))
        sheet.paste(after.resize((size, size)), (x + size + 4, y + 34))
        draw.text((x, y + 36 + size), "without", INK, font(10))
        draw.text((x + size + 4, y + 36 + size), "with the region", SAFE, font(10))
    return sheet


def encoded(image: Image.Image, kind: str) -> bytes:
    """The picture as a file of that kind has it."""
    content = BytesIO()
    image.save(content, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return content.getvalue()


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, encoded(image, "PNG"))
