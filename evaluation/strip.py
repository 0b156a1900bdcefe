"""The heat strip as a picture, for sharing."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..training.report import FAINT, INK, PAPER, SAFE, UNSAFE, font, shorten
from .heat import Item, Strip, depth_text

WIDTH, MARGIN, GAP, BOX, ROW = 860, 16, 6, 26, 56
ARROW = 40  # pixels of an arrow that moves a token by its own length
TINT, PALE, GREY = "#e3f1ea", "#fbe3e6", "#5b6470"  # inside, just outside, small print
LOOKED_AT = ("start", "end", "template", "pooled", "piece", "token")


def blend(one: str, other: str, share: float) -> str:
    """A colour between two, as #rrggbb."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def colour(item: Item) -> str:
    """The ground of a word: neutral where nothing looks, green inside, from pale to full red outside."""
    if item.depth is None:
        return "#eef0f3"
    return blend(PALE, UNSAFE, item.heat) if item.depth > 0 else TINT


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, shift: float) -> None:
    length = ARROW * min(shift, 2.0)
    if length < 2:
        return
    draw.line((x, y, x + length, y), fill=INK, width=2)
    draw.polygon([(x + length + 4, y), (x + length - 2, y - 4), (x + length - 2, y + 4)], fill=INK)


def _size(draw: ImageDraw.ImageDraw, item: Item) -> tuple[str, float]:
    text = shorten(" ".join(item.text.split()), draw, 300, 14)
    return text, max(draw.textlength(text, font(14)) + 14, ARROW * min(item.shift, 2.0) + 8, 34.0)


def _places(draw: ImageDraw.ImageDraw, items: Sequence[Item], width: int) -> list[tuple[float, int, float, str]]:
    """Left, line, width and text of each item."""
    places, x, line = [], 0.0, 0
    for item in items:
        text, wide = _size(draw, item)
        if x and x + wide > width:
            x, line = 0.0, line + 1
        places.append((x, line, wide, text))
        x += wide + GAP
    return places


def _item(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, text: str, item: Item) -> None:
    quiet = item.kind in LOOKED_AT
    outside = item.depth is not None and item.depth > 0
    ink = PAPER if item.heat > 0.6 else GREY if quiet and not outside else INK
    draw.rounded_rectangle((x, y, x + width, y + BOX), 5, colour(item), UNSAFE if outside else None)
    draw.text((x + 7, y + 5), text, ink, font(14))
    if outside:  # without colour, the bar and the number say it too
        draw.rectangle((x, y + BOX + 2, x + width * item.heat, y + BOX + 4), fill=UNSAFE)
        draw.text((x, y + BOX + 5), depth_text(item.depth), "#a32f40", font(10))
    _arrow(draw, x, y + BOX + 22, item.shift)


def _legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    x = MARGIN
    for ground, text in ((TINT, "inside"), (PALE, "just outside"), (UNSAFE, "far outside")):
        draw.rounded_rectangle((x, y, x + 16, y + 12), 3, ground)
        draw.text((x + 21, y), text, GREY, font(11))
        x += 32 + int(draw.textlength(text, font(11)))
    _arrow(draw, x, y + 6, 0.6)
    text = "how far it was moved. Numbers: how far beyond the wall; from 1 the gate is fully open."
    draw.text((x + 34, y), text, GREY, font(11))


def _lines(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> list[str]:
    """Text cut into lines of a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font(size)) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shorten(line, draw, width, size) for line in lines]


def strip_picture(strip: Strip, pictures: Sequence[tuple[str, Image.Image]] = (), size: int = 128) -> Image.Image:
    """One prompt's strip: the verdict, its words by colour with arrows, and pictures with a caption each."""
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    inner = WIDTH - 2 * MARGIN
    heading = _lines(ruler, strip.verdict, inner, 15)
    details = [*strip.lines, *([f"and {strip.left_out} more words"] if strip.left_out else [])]
    small = [line for text in details for line in _lines(ruler, text, inner, 12)]
    places = _places(ruler, strip.items, inner)
    rows = places[-1][1] + 1 if places else 0
    top = MARGIN + 26 + 21 * len(heading) + 17 * len(small) + 12
    words = top + rows * ROW
    high = words + 26 + (size + 30 if pictures else 0)
    sheet = Image.new("RGB", (WIDTH, high), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = shorten(f'Safe region "{" ".join(strip.region.split())}"', draw, inner, 17)
    draw.text((MARGIN, MARGIN - 4), title, INK, font(17))
    for i, line in enumerate(heading):
        draw.text((MARGIN, MARGIN + 22 + 21 * i), line, SAFE if strip.safe else UNSAFE, font(15))
    for i, line in enumerate(small):
        draw.text((MARGIN, MARGIN + 24 + 21 * len(heading) + 17 * i), line, INK, font(12))
    for (x, line, width, text), item in zip(places, strip.items):
        _item(draw, MARGIN + x, top + line * ROW, width, text, item)
    _legend(draw, words + 2)
    for i, (caption, picture) in enumerate(pictures):
        x, y = MARGIN + i * (size + 12), words + 26
        sheet.paste(picture.convert("RGB").resize((size, size)), (x, y))
        draw.text((x, y + size + 3), caption, INK, font(11))
    draw.line((0, high - 1, WIDTH, high - 1), fill=FAINT)
    return sheet


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Strips below one another."""
    sheet = Image.new("RGB", (WIDTH, sum(picture.height for picture in pictures)), PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


def coloured(strip: Strip) -> None:
    """Print the words in colour, where rich is there to do so."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return
    line = Text()
    for item in strip.items:
        style = "dim" if item.depth is None else f"{INK} on {colour(item)}"
        line.append(f" {item.text} ", style).append(" ")
    Console().print(line)
