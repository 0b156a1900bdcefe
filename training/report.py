"""Pictures of a training run, drawn with Pillow: loss curve, depths, before and after."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from ..region.region import Region
from ..region.verdict import Verdict, on_harmless, on_unsafe
from .lettering import font, lines, wrapped, write
from .progress import Separation, smooth

MOST_PREVIEW = 20_000  # bytes of the picture in a region's metadata, as text
INK, PALE, FAINT, SAFE, UNSAFE, PAPER = "#22262b", "#6b7280", "#c9ced6", "#2f9e6e", "#d1495b", "#ffffff"
TONES = {"good": "#1d7a52", "warn": "#9a5b00", "bad": "#b3261e", "neutral": INK}  # of verdicts, readable on PAPER
STAGES = {  # of a run, by what they do
    "reading prompts": ("encode",), "walls": ("gate", "calibrate", "harden"), "first move": ("instant",),
    "{steps} steps": ("trajectories", "discover", "strength"), "pictures": ("preview", "report"),
}  # fmt: skip
KINDS = ("#3f6fb5", "#8a5a9e")  # prompts that should be inside, and outside: neither colour means good or bad


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 to a Pillow image."""
    array = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


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


def _curve(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], values: Sequence[float], measure: str) -> None:
    left, top, right, bottom = box
    draw.text((left, top - 20), measure, INK, font(12))
    draw.rectangle(box, outline=FAINT)
    if not values:
        return
    means = smooth(values)
    high = max(*values, 1e-9) if len(values) < 40 else max(*means, 1e-9)

    def points(of: Sequence[float]) -> list[tuple[float, float]]:
        across = (right - left) / max(1, len(of) - 1)
        return [(left + across * i, max(bottom - (bottom - top) * 0.95 * y / high, top)) for i, y in enumerate(of)]

    draw.line(points(values), fill=FAINT)
    draw.line(points(means), fill=KINDS[0], width=2)
    draw.text((left + 4, top + 4), f"{high:.3g}", PALE, font(10))
    draw.text((left + 4, bottom - 16), "0", PALE, font(10))
    last = f"{means[-1]:.3g} after {len(values)} steps"
    draw.text((right - 6 - draw.textlength(last, font(10)), top + 4), last, INK, font(10))


def _histogram(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], found: Separation | None) -> None:
    left, top, right, bottom = box
    draw.text((left, top - 20), "held-out prompts, by their depth beyond the walls", INK, font(12))
    draw.rectangle(box, outline=FAINT)
    if found is None:
        return
    wide = (right - left) / len(found.counts[0])
    for i, (counts, colour) in enumerate(zip(found.counts, KINDS)):
        for j, count in enumerate(counts):
            x, high = left + wide * (j + i / 2), (bottom - top - 24) * count / max(1, *counts)
            if count:
                draw.rectangle((x, bottom - max(high, 1), x + wide / 2, bottom), fill=colour)
        words = f"{found.names[i]}: {found.outside[i]:.1%} outside"
        x = left + 6 if i == 0 else right - 6 - draw.textlength(words, font(11))
        draw.text((x, top + 4), words, colour, font(11))
    zero = left + (right - left) * -found.low / (found.high - found.low)
    draw.line((zero, top + 20, zero, bottom), fill=INK)
    draw.text((zero + 4, top + 20), "wall", INK, font(10))


def of_new_words(depths: Tensor) -> dict[str, float | int]:
    """What a run's numbers say about held-out prompts [N], whose words it did not learn from, by their depth."""
    return {"held_out_words": len(depths), "held_out_words_touched": float((depths > 0).float().mean())}


def where_time_went(numbers: dict[str, Any]) -> str:
    """In which of its stages a run spent its time, the longest first; those of less than a second are left out."""
    spent = numbers.get("stage_seconds", {})
    sums = {name.format(steps=numbers.get("steps", 0)): sum(spent.get(stage, 0.0) for stage in stages)
            for name, stages in STAGES.items()}  # fmt: skip
    longest = sorted(sums.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest if seconds >= 1)


def summary(numbers: dict[str, Any]) -> list[str]:
    """What a run can say about itself, in a few words a line; its numbers name the attribute that it balances."""
    lines = [f"learned in {numbers['seconds']:.0f} s"] if "seconds" in numbers else []
    if lines and (spent := where_time_went(numbers)):
        lines[0] += f" ({spent})"
    lines += [*on_unsafe(numbers), *on_harmless(numbers, kinds=True)]
    if "drawn_safely" in numbers:
        lines.append(f"{numbers['drawn_safely']:.0%} of held-out unsafe prompts draw safely when they are moved")
    return lines


def picture(
    title: str,
    losses: Sequence[float],
    measure: str,
    found: Separation | None,
    rows: Sequence[tuple[str, Image.Image, Image.Image]],
    numbers: dict[str, Any],
    verdict: Verdict,
) -> Image.Image:
    """The report of one training run: what it is worth comes first."""
    grid = before_after(rows, 3) if rows else None
    width = max(860, grid.width if grid else 0)
    judged = lines(verdict.line, width - 24, 15)
    told = [line for number in summary(numbers) for line in lines(number, width - 24, 12)]
    below = 36 + 21 * len(judged)
    top = below + 17 * len(told) + 34
    sheet = Image.new("RGB", (width, top + 220 + (grid.height if grid else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (12, 8), f"Safe region: {title}", INK, 20)
    write(draw, (12, 36), "\n".join(judged), TONES[verdict.tone], 15)
    write(draw, (12, below), "\n".join(told), INK, 12)
    _curve(draw, (12, top, width // 2 - 10, top + 200), losses, measure)
    _histogram(draw, (width // 2 + 10, top, width - 12, top + 200), found)
    if grid:
        sheet.paste(grid, (0, top + 216))
    return sheet
