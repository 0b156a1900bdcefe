"""Measuring on the demo model: draw prompts with and without regions, and let the judge look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from ..backbones.demo import DemoBackbone
from ..backbones.sampling import sample
from ..demo import world
from ..demo.model import Judge, Verdict
from ..region.conditioning import Entry, apply_to_conditioning
from ..region.region import Region
from ..training.previews import to_image
from .demo_prompts import DemoPrompt, model_prompts, weapon_prompts

BATCH = 40
SHOWN = 4  # pictures of a set


@dataclass
class SetResult:
    """What was measured on one prompt set; shares are of its prompts."""

    name: str
    count: int
    unsafe_before: float
    unsafe_after: float
    kept: float | None  # of the pictures that show what was asked for without the region, the share that still do
    identical: float  # pictures the same to the bit
    pixel_change: float  # mean absolute change, of 255
    examples: list[tuple[str, Image.Image, Image.Image]] = field(default_factory=list, repr=False)
    failed: list[bool] = field(default_factory=list, repr=False)  # which of them are unsafe with the region

    def numbers(self) -> dict[str, float | int | str | None]:
        return {name: value for name, value in vars(self).items() if name not in ("examples", "failed")}


def draw(
    backbone: DemoBackbone,
    entries: Sequence[Entry],
    guidance: float,
    steps: int,
    seed: int,
    visit: Callable[[], None] = lambda: None,
    known: tuple[Sequence[Entry], Tensor] | None = None,
) -> Tensor:
    """Pictures [N, 3, 128, 128]; batch by batch, so that the same prompt and place give the same bits.

    Args:
        known: entries that were drawn with the same settings, and their pictures. A batch that is the same to the bit
            is taken from there: drawing is deterministic.
    """
    empty = backbone.encode([""])[0]
    pictures = []
    for begin in range(0, len(entries), BATCH):
        batch = entries[begin : begin + BATCH]
        if known and all(torch.equal(a[0], b[0]) for a, b in zip(batch, known[0][begin : begin + BATCH])):
            pictures.append(known[1][begin : begin + BATCH])
        else:
            pictures.append(backbone.decode(sample(backbone, batch, empty, guidance, steps, seed + begin)))
        visit()
    return torch.cat(pictures)


def shows_asked(verdict: Verdict, prompt: DemoPrompt) -> bool:
    """Whether all that the prompt asks for by name is in the picture."""
    return all(verdict.shows(name) for name in prompt.asked)


def measure_set(
    backbone: DemoBackbone,
    judge: Judge,
    regions: Mapping[str, Region],
    name: str,
    prompts: Sequence[DemoPrompt],
    guidance: float = 4.0,
    steps: int = 20,
    seed: int = 7,
    visit: Callable[[], None] = lambda: None,
) -> dict[str, SetResult]:
    """Draw a set of prompts without and with each region, from the same noise, and compare. Results by region."""
    entries = backbone.encode([prompt.text for prompt in prompts])
    before = draw(backbone, entries, guidance, steps, seed, visit)
    told_before = judge(before)
    named = [i for i, p in enumerate(prompts) if p.asked and shows_asked(told_before[i], p)]
    results = {}
    for region_name, region in regions.items():
        after = draw(backbone, apply_to_conditioning(entries, region), guidance, steps, seed, visit, (entries, before))
        told_after = judge(after)
        kept = sum(shows_asked(told_after[i], prompts[i]) for i in named) / len(named) if named else None
        same = (before == after).flatten(1).all(1)
        missed = [i for i, v in enumerate(told_after) if v.unsafe and i >= SHOWN][:SHOWN]
        shown = [*range(min(SHOWN, len(prompts))), *missed]  # the first ones, and failures among the others
        results[region_name] = SetResult(
            name, len(prompts),
            sum(v.unsafe for v in told_before) / len(prompts), sum(v.unsafe for v in told_after) / len(prompts),
            kept, float(same.float().mean()), float((before - after).abs().mean() * 255),
            [(prompts[i].text, to_image(before[i]), to_image(after[i])) for i in shown],
            [told_after[i].unsafe for i in shown],
        )  # fmt: skip
    return results


@dataclass(frozen=True)
class ModelResult:
    """How well the demo model draws what it is asked for, by the judge. Shares of the prompts of each list."""

    named: float  # the asked thing is in the picture, over all kinds
    weapons: float  # weapon words draw that weapon
    men: dict[str, tuple[float, float]]  # profession: share of men drawn, share of men in the world
    samples: list[tuple[str, Image.Image, bool]] = field(repr=False)  # prompt, picture, whether the judge agrees


def measure_model(
    backbone: DemoBackbone, judge: Judge, guidance: float = 4.0, steps: int = 20, seed: int = 11, people: int = 60
) -> ModelResult:
    """Draw 40 prompts of ten kinds, every weapon word, and each profession `people` times."""
    kinds, weapons = model_prompts(), weapon_prompts()
    drawn = draw(backbone, backbone.encode([p.text for p in kinds + weapons]), guidance, steps, seed)
    right = [shows_asked(verdict, p) for verdict, p in zip(judge(drawn), kinds + weapons)]
    jobs = [job for job in world.PROFESSIONS for _ in range(people)]
    texts = [f"a {world.PROFESSIONS[job][1][i % 3]}" for i, job in enumerate(jobs)]
    seen = judge(draw(backbone, backbone.encode(texts), guidance, steps, seed + 1))
    men = {}
    for job, (_, _, share) in world.PROFESSIONS.items():
        chances = [v.things for v, drawn_job in zip(seen, jobs) if drawn_job == job]
        men[job] = (sum(c[f"man {job}"] > c[f"woman {job}"] for c in chances) / people, share)
    samples = [(p.text, to_image(picture), ok) for p, picture, ok in zip(kinds, drawn, right)]
    return ModelResult(
        sum(right[: len(kinds)]) / len(kinds), sum(right[len(kinds) :]) / len(weapons), men, samples
    )  # fmt: skip
