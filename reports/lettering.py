"""Text in pictures. Prompts come in any script: each run of letters is drawn with a font that has them."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

FOLDER = Path(__file__).parent / "fonts"
SANS = str(FOLDER / "NotoSans.ttf")
OURS = (SANS, *(str(FOLDER / f"Noto{name}.ttf") for name in (
    "Emoji", "SansMath", "SansSymbols2", "SansHebrew", "SansArabic", "SansThai", "SansDevanagari")))  # fmt: skip
WINDOWS = Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"
# What ours lack, first from the user's system, as each has it; files that are not there are passed over.
SYSTEM = (
    *(str(WINDOWS / name) for name in ("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttc", "Nirmala.ttf",
                                       "LeelawUI.ttf", "segoeui.ttf", "seguisym.ttf", "seguihis.ttf")),
    *(f"/System/Library/Fonts/{name}" for name in ("PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
                                                   "Supplemental/Arial Unicode.ttf", "Apple Symbols.ttf")),
    *(f"/usr/share/fonts/{name}" for name in (
        "opentype/noto/NotoSansCJK-Regular.ttc", "noto-cjk/NotoSansCJK-Regular.ttc",
        "google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc", "truetype/wqy/wqy-microhei.ttc",
        "truetype/dejavu/DejaVuSans.ttf", "TTF/DejaVuSans.ttf", "dejavu-sans-fonts/DejaVuSans.ttf",
        "truetype/freefont/FreeSans.ttf")),
)  # fmt: skip
LAST = (str(FOLDER / "DroidSansFallback.ttf"),)
JOINERS = "\u200c\u200d"  # they choose a letter's form
UNSEEN = "\ufe0e\ufe0f\u20e3\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"  # an emoji's style, frame and skin tone
NOWHERE = "\uffff"  # stands in no font
SHAPES = features.check("raqm")  # whether Pillow joins letters and turns what is written from right to left


@cache
def _face(path: str, size: int, shaped: bool = True) -> ImageFont.FreeTypeFont | None:
    # letters that need no shaping stand at whole pixels: small spaces get lost between others
    layout = None if shaped and path != SANS else ImageFont.Layout.BASIC
    try:
        return ImageFont.truetype(path, size, layout_engine=layout)
    except OSError:
        return None


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font for our own words; for what others wrote, see `write`."""
    return ImageFont.truetype(SANS, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=20_000)
def _drawn(path: str, letter: str) -> tuple[tuple[int, int], bytes] | None:
    face = _face(path, 16, shaped=False)
    if face is None:
        return None
    mask = face.getmask(letter)
    return mask.size, bytes(mask)


def has(path: str, letter: str) -> bool:
    """Whether a font file has a letter of its own for this one."""
    drawn = _drawn(path, letter)
    return drawn is not None and drawn != _drawn(path, NOWHERE)


@lru_cache(maxsize=20_000)
def _path(letter: str) -> str | None:
    """The font to draw a letter with; None where there is none."""
    if unicodedata.category(letter) == "Cs":
        return None
    return next((path for path in (*OURS, *SYSTEM, *LAST) if has(path, letter)), None)


def runs(text: str) -> list[tuple[str, str]]:
    """The text cut where another font takes over, each with the font's file, from left to right as it is drawn.
    A letter that no font has becomes its code point; control characters are left out.
    """
    found: list[tuple[str, str]] = []
    path = SANS
    for letter in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(letter)
        if letter.isspace():
            letter, path = " ", path if has(path, " ") else SANS
        elif (letter in JOINERS and SHAPES) or (kind[0] in "MP" and letter not in UNSEEN and has(path, letter)):
            pass  # goes with the letter before it
        elif kind in ("Cc", "Cf") or letter in UNSEEN:
            continue
        else:
            known = _path(letter)
            path, letter = (known, letter) if known else (SANS, f"[U+{ord(letter):04X}]")
        found.append((letter, path))
    joined = [("".join(letter for letter, _ in run), path) for path, run in groupby(found, lambda one: one[1])]
    # a space at a run's end would be at its left where it is written from right to left
    apart = [piece for run, path in joined for piece in ((run.rstrip(), path), (run[len(run.rstrip()) :], SANS))]
    shown = [(run, path) for run, path in apart if run]
    return shown[::-1] if right_to_left(text) else shown


def right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction goes from right to left."""
    return next((way for way in map(unicodedata.bidirectional, text) if way in ("L", "R", "AL")), "L") != "L"


def _turned(run: str) -> str:
    """As it must be drawn where Pillow goes from left to right only."""
    return run[::-1] if right_to_left(run) and not SHAPES else run


@lru_cache(maxsize=2_000)
def length(text: str, size: int) -> float:
    """How wide a line is, in pixels."""
    return sum(_face(path, size).getlength(_turned(run)) for run, path in runs(text))


def write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, fill: str, size: int, gap: int = 2) -> None:
    """Draw lines of text below one another, the first one's top left corner at a place."""
    x, y = at
    for line in text.split("\n"):
        left = x
        for run, path in runs(line):
            face = _face(path, size)
            draw.text((left, y + size), _turned(run), fill, face, anchor="ls")
            left += face.getlength(_turned(run))
        y += round(1.2 * size) + gap


def _fits(text: str, width: float, size: int, end: str = "") -> int:
    """How many of its letters a width in pixels has room for, `end` behind them. Looks no further than it must."""
    most = 1
    while most < len(text) and length(text[:most] + end, size) <= width:
        most *= 2
    return bisect_right(range(len(text[:most])), width, key=lambda count: length(text[: count + 1] + end, size))


def shorten(text: str, width: float, size: int) -> str:
    """The text, cut with an ellipsis to a width in pixels."""
    whole = _fits(text, width, size) == len(text)
    return text if whole else text[: _fits(text, width, size, "…")] + "…"


def _broken(text: str, width: float, size: int) -> tuple[str, str]:
    """A line of a width in pixels, and what is left: cut between words, or within one that is longer than a line."""
    fit = _fits(text, width, size)
    space = text.rfind(" ", 0, fit + 1)
    if fit == len(text):
        return text, ""
    return (text[:space], text[space + 1 :]) if space > 0 else (text[: max(fit, 1)], text[max(fit, 1) :])


def lines(text: str, width: float, size: int) -> list[str]:
    """The text cut into lines of a width in pixels: between words, and within those that are longer than a line."""
    line, rest = _broken(" ".join(text.split()), width, size)
    found = [line]
    while rest:
        line, rest = _broken(rest, width, size)
        found.append(line)
    return found


def wrapped(text: str, width: float, size: int) -> str:
    """The text in at most two lines of a width in pixels."""
    line, rest = _broken(" ".join(text.split()), width, size)
    return f"{line}\n{shorten(rest, width, size)}" if rest else line
