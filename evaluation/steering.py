"""One method, one prompt set, one guidance: draw with and without the method from the same noise, and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..demo.model import Judge, PictureTextScore, without_weights
from ..region import inspection
from ..region.conditioning import Entry, text_blocks
from ..region.region import Region
from ..region.steering import worst_depth
from ..region.verdict import wilson as interval
from .baselines import Conditioning, Method
from .demo_measure import BATCH, shows_asked
from .demo_prompts import DemoPrompt
from .rebuilt import text_of

HARMLESS_SETS = ("harmless", "near neighbours", "word salad", "diluted harmless")


@dataclass(frozen=True)
class Drawn:
    """What a method makes of a prompt set: its conditionings, pictures [N, 3, H, W] and what the judge sees."""

    method: Method
    conditionings: list[Conditioning]
    pictures: Tensor
    unsafe: list[bool]
    asked: list[bool]  # what the prompt asks for by name is there; False where it asks for nothing


@dataclass(frozen=True)
class Measured:
    """Counts and means over one prompt set; shares come from the counts."""

    count: int
    unsafe: int
    asks: int  # prompts that ask for something harmless by name
    asked: int  # of these, where it is in the picture
    before: int  # of these, where it is there without the method
    kept: int  # of the latter, where it still is
    identical: int  # pictures the same to the bit as without the method
    pixel_change: float  # mean absolute difference, of 255
    text_score: float  # the demo's CLIP score of picture and prompt

    def numbers(self) -> dict[str, Any]:
        return asdict(self)


def _only_text(method: Method, plain: Method, guidance: float) -> bool:
    """Whether a conditioning that the method leaves alone is drawn as `plain` draws it."""
    negative = guidance == 1 or torch.equal(method.negative[0], plain.negative[0])
    return method.backbone is plain.backbone and method.guide is plain.guide and negative


def _same(one: Conditioning, other: Conditioning) -> bool:
    return len(one) == len(other) == 1 and torch.equal(one[0][0], other[0][0]) and one[0][1] == other[0][1]


def draw_set(
    method: Method,
    judge: Judge,
    prompts: Sequence[DemoPrompt],
    guidance: float,
    steps: int,
    seed: int,
    plain: Drawn | None = None,
    visit: Callable[[], None] = lambda: None,
    half: bool = False,
) -> Drawn:
    """Draw prompts in fixed batches, so that the same conditioning at the same place gives the same bits.

    Args:
        half: sample in bfloat16, in about 60 % of the time where the CPU has it; all else stays in float32.
        plain: the set as the model draws it. Where a method changes nothing but conditionings, batches that it leaves
            alone are taken from there.
    """
    conditionings = method.positive([prompt.text for prompt in prompts])
    reuse = plain is not None and _only_text(method, plain.method, guidance)
    pictures = []
    for begin in range(0, len(prompts), BATCH):
        batch = conditionings[begin : begin + BATCH]
        if reuse and all(_same(a, b) for a, b in zip(batch, plain.conditionings[begin : begin + BATCH])):
            pictures.append(plain.pictures[begin : begin + BATCH])
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                latents = method.sample(batch, guidance, steps, seed + begin)
            pictures.append(method.backbone.decode(latents.float()))
        visit()
    drawn = torch.cat(pictures)
    verdicts = judge(drawn)
    asked = [bool(p.asked) and shows_asked(v, p) for v, p in zip(verdicts, prompts)]
    return Drawn(method, conditionings, drawn, [v.unsafe for v in verdicts], asked)


def compare(prompts: Sequence[DemoPrompt], plain: Drawn, drawn: Drawn, score: PictureTextScore) -> Measured:
    """What a method did to a prompt set."""
    difference = (plain.pictures - drawn.pictures).abs().flatten(1)
    words = [without_weights(text_of(prompt.text)) for prompt in prompts]
    return Measured(
        len(prompts), sum(drawn.unsafe), sum(bool(p.asked) for p in prompts), sum(drawn.asked), sum(plain.asked),
        sum(a and b for a, b in zip(plain.asked, drawn.asked)), int((difference == 0).all(1).sum()),
        float(difference.mean() * 255), float(score(drawn.pictures, words).mean()),
    )  # fmt: skip


def opened(entries: Sequence[Entry], region: Region) -> int:
    """On how many prompts the gate opens, be it by a wall or by the scope."""
    return sum(row.opened for entry in entries for row in inspection.judge([entry], region))


def outside(entries: Sequence[Entry], region: Region) -> int:
    """How many prompts are beyond the walls of a region with one part."""
    (part,) = region.parts
    return sum(bool(worst_depth(text_blocks(entry), part) > 0) for entry in entries)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    return interval(successes / count, count) if count else (0.0, 1.0)


def dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (both coordinates: less is better) some other point beats in one and matches in the other."""
    return [any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]
