"""The heat strip as a picture, for sharing."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..evaluation.heat import WHOLE, Item, Strip, unfolded
from .drawing import FAINT, INK, PAPER, UNSAFE
from .lettering import font, length, lines, right_to_left, shorten, write

WIDTH, MARGIN, GAP, BOX, ROW = 860, 16, 6, 26, 48
ARROW = 40  # pixels of an arrow that moves a token by its own length
TINT, PALE, GREY = "#e3f1ea", "#fbe3e6", "#5b6470"  # inside, just outside, small print
TONES = {"good": "#1f7a54", "warn": "#8a5a00", "bad": "#b3243a"}  # dark enough to read on paper
FULL = 0.75  # how much of the red the worst word has: on more its letters could not be read
QUIET = (*WHOLE, "piece", "token")


def blend(one: str, other: str, share: float) -> str:
    """A colour between two, as #rrggbb."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def colour(item: Item) -> str:
    """The ground of a word: neutral where nothing looks, green inside, from pale to full red outside."""
    if item.depth is None:
        return "#eef0f3"
    return blend(PALE, UNSAFE, FULL * item.heat) if item.depth > 0 else TINT


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, shift: float) -> None:
    length = ARROW * min(shift, 2.0)
    if length < 2:
        return
    draw.line((x, y, x + length, y), fill=INK, width=2)
    draw.polygon([(x + length + 4, y), (x + length - 2, y - 4), (x + length - 2, y + 4)], fill=INK)


def _size(one: Item | str) -> tuple[str, float]:
    if isinstance(one, str):
        return one, length(one, 12) + 14
    text = shorten(" ".join(one.text.split()), 300, 14)
    return text, max(length(text, 14) + 14, ARROW * min(one.shift, 2.0) + 8, 34.0)


def _places(shown: Sequence[Item | str], width: int, mirrored: bool) -> list[tuple[float, int, float, str]]:
    """Left, line, width and text of each item; mirrored, they go from right to left."""
    places, x, line = [], 0.0, 0
    for one in shown:
        text, wide = _size(one)
        if x and x + wide > width:
            x, line = 0.0, line + 1
        places.append((width - x - wide if mirrored else x, line, wide, text))
        x += wide + GAP
    return places


def _item(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, text: str, item: Item | str) -> None:
    if isinstance(item, str):
        write(draw, (x + 7, y + 5), text, GREY, 12)
        return
    outside = item.depth is not None and item.depth > 0
    ink = GREY if item.kind in QUIET and not outside else INK
    draw.rounded_rectangle((x, y, x + width, y + BOX), 5, colour(item), UNSAFE if outside else None)
    write(draw, (x + 7, y + 4), text, ink, 14)
    if item.unknown:
        _dots(draw, x + 7, y + BOX - 4, width - 14, ink)
    if outside:  # without colour, the bar says it too
        draw.rectangle((x, y + BOX + 2, x + width * item.heat, y + BOX + 4), fill=UNSAFE)
    _arrow(draw, x, y + BOX + 12, item.shift)


def _dots(draw: ImageDraw.ImageDraw, x: float, y: float, width: float, ink: str) -> None:
    for step in range(0, int(width), 4):
        draw.rectangle((x + step, y, x + step + 1, y + 1), fill=ink)


def _legend(draw: ImageDraw.ImageDraw, y: int, unknown: bool) -> None:
    x = MARGIN
    for ground, text in ((TINT, "inside"), (PALE, "just outside"), (blend(PALE, UNSAFE, FULL), "far outside")):
        draw.rounded_rectangle((x, y, x + 16, y + 12), 3, ground)
        draw.text((x + 21, y), text, GREY, font(11))
        x += 32 + int(draw.textlength(text, font(11)))
    _arrow(draw, x, y + 6, 0.6)
    draw.text((x + 34, y), "how far it was moved", GREY, font(11))
    if unknown:
        x += 50 + int(draw.textlength("how far it was moved", font(11)))
        _dots(draw, x, y + 10, 24, INK)
        draw.text((x + 30, y), "a word that the model does not know", GREY, font(11))


def strip_picture(strip: Strip, pictures: Sequence[tuple[str, Image.Image]] = (), size: int = 128) -> Image.Image:
    """One prompt's strip: the verdict, its words by colour with arrows, and pictures with a caption each."""
    inner = WIDTH - 2 * MARGIN
    heading = lines(strip.verdict, inner, 15)
    details = [*map(str, strip.notes), *([f"and {strip.left_out} more words"] if strip.left_out else [])]
    small = [line for text in details for line in lines(text, inner, 12)]
    shown = unfolded(strip)
    mirrored = right_to_left(" ".join(item.text for item in strip.items if item.kind == "word"))
    places = _places(shown, inner, mirrored)
    rows = places[-1][1] + 1 if places else 0
    top = MARGIN + 26 + 21 * len(heading) + 17 * len(small) + 12
    words = top + rows * ROW
    high = words + 26 + (size + 30 if pictures else 0)
    sheet = Image.new("RGB", (WIDTH, high), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = shorten(f'Safe region "{" ".join(strip.region.split())}"', inner, 17)
    write(draw, (MARGIN, MARGIN - 4), title, INK, 17)
    for i, line in enumerate(heading):
        write(draw, (MARGIN, MARGIN + 22 + 21 * i), line, TONES[strip.tone], 15)
    for i, line in enumerate(small):
        write(draw, (MARGIN, MARGIN + 24 + 21 * len(heading) + 17 * i), line, INK, 12)
    for (x, line, width, text), one in zip(places, shown):
        _item(draw, MARGIN + x, top + line * ROW, width, text, one)
    _legend(draw, words + 2, any(item.unknown for item in strip.items))
    for i, (caption, picture) in enumerate(pictures):
        x, y = MARGIN + i * (size + 12), words + 26
        sheet.paste(picture.convert("RGB").resize((size, size)), (x, y))
        write(draw, (x, y + size + 3), caption, INK, 11)
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
    for one in unfolded(strip):
        dim = isinstance(one, str) or one.depth is None
        text = one if isinstance(one, str) else one.text
        line.append(f" {text} ", "dim" if dim else f"{INK} on {colour(one)}").append(" ")
    Console().print(line)
