"""What a training run can say of itself: its summary in lines, and its picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from ..region.verdict import on_harmless, on_unsafe, verdict
from ..training.learner import Learner
from ..training.progress import Separation, smooth
from ..training.stages import WORDS
from .drawing import FAINT, INK, PALE, PAPER, before_after
from .lettering import font, lines, write

TONES = {"good": "#1d7a52", "warn": "#9a5b00", "bad": "#b3261e", "neutral": INK}  # of verdicts, readable on PAPER
KINDS = ("#3f6fb5", "#8a5a9e")  # prompts that should be inside, and outside: neither colour means good or bad


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


def where_time_went(numbers: dict[str, Any]) -> str:
    """In which of its stages a run spent its time, the longest first; those of less than a second are left out."""
    sums: Counter[str] = Counter()
    for stage, seconds in numbers.get("stage_seconds", {}).items():
        if stage in WORDS:
            sums[WORDS[stage].format(steps=numbers.get("steps", 0))] += seconds
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


def picture(run: Learner) -> Image.Image:
    """A run on one sheet: what it is worth comes first, then loss curve, depths of both kinds of prompts, and what
    was drawn before and after.
    """
    judged_by = verdict(run.region.metadata if run.region else {})
    grid = before_after(run.before_after, 3) if run.before_after else None
    width = max(860, grid.width if grid else 0)
    judged = lines(judged_by.line, width - 24, 15)
    told = [line for number in summary(run.numbers) for line in lines(number, width - 24, 12)]
    below = 36 + 21 * len(judged)
    top = below + 17 * len(told) + 34
    sheet = Image.new("RGB", (width, top + 220 + (grid.height if grid else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (12, 8), f"Safe region: {run.concept}", INK, 20)
    write(draw, (12, 36), "\n".join(judged), TONES[judged_by.tone], 15)
    write(draw, (12, below), "\n".join(told), INK, 12)
    _curve(draw, (12, top, width // 2 - 10, top + 200), run.losses, run.measure)
    _histogram(draw, (width // 2 + 10, top, width - 12, top + 200), run.separation)
    if grid:
        sheet.paste(grid, (0, top + 216))
    return sheet
