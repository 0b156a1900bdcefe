"""What a baseline is: one way to keep a concept out of pictures, ready to draw with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...backbones.demo import DemoBackbone
from ...backbones.protocol import Backbone
from ...backbones.sampling import Guide, guided, sample
from ...demo.networks import Attention, TextBlock, UNet
from ...region.conditioning import CROSS_ATTENTION, Entry, apply_to_conditioning
from ...region.region import Region
from ...region.steering import displacement, judged, openness, worst_depth
from ..rebuilt import encode_rebuilt

Conditioning = list[Entry]  # of one prompt: one entry, or several that share its sampling between them


def sigma_at(levels: Tensor, percent: float) -> float:
    """Noise level at a share of sampling, as ComfyUI's `percent_to_sigma` has it: that of timestep (1 - percent) 999.

    `levels` [1000] are the sigmas of the timesteps, rising; between two of them their logarithm is interpolated.
    """
    if percent <= 0:
        return math.inf
    if percent >= 1:
        return 0.0
    timestep = (1 - percent) * (len(levels) - 1)
    return float(levels.log()[math.floor(timestep)].lerp(levels.log()[math.ceil(timestep)], timestep % 1).exp())


def in_force(conditioning: Conditioning, sigma: float, levels: Tensor) -> Entry:
    """The first entry whose range holds at this noise level. (Where two ranges meet, ComfyUI would draw both.)"""
    for entry in conditioning:
        start, end = entry[1].get("start_percent", 0.0), entry[1].get("end_percent", 1.0)
        if sigma_at(levels, start) >= sigma >= sigma_at(levels, end):
            return entry
    raise ValueError(f"No entry of the conditioning is in force at noise level {sigma:.3g}.")


def scheduled(conditionings: Sequence[Conditioning], levels: Tensor, guide: Guide) -> Guide:
    """`guide`, with the entries that are in force at each noise level."""

    def guide_now(
        backbone: Backbone, x: Tensor, sigma: Tensor, entries: Sequence[Entry], empty: Entry | None, guidance: float
    ) -> Tensor:
        now = [in_force(conditioning, float(level), levels) for conditioning, level in zip(conditionings, sigma)]
        return guide(backbone, x, sigma, now, empty, guidance)

    return guide_now


@dataclass(frozen=True)
class Method:
    """One way to keep a concept out of pictures: what it changes about drawing a prompt."""

    name: str
    backbone: DemoBackbone  # draws; a method that changes the UNet has one of its own
    positive: Callable[[Sequence[str]], list[Conditioning]]  # a conditioning for each prompt
    negative: Entry  # in the place of the empty prompt
    guide: Callable[[int], Guide] = lambda steps: guided  # a fresh guide for sampling in so many steps
    # cost of a step in evaluations of the UNet for one picture: with guidance, and at guidance 1
    evaluations: tuple[float, float] = (2.0, 1.0)
    # what `positive` does to text states [B, T, D], as far as attacks need its gradient: by default it counts as 1
    slope: Callable[[Tensor], Tensor] = lambda states: states

    def with_region(self, region: Region, **options: Any) -> Method:
        """This method and a region: the region steers what this method made of the prompt.

        `options` are those of `apply_to_conditioning`: strength, mode, start, end.
        """

        def positive(prompts: Sequence[str]) -> list[Conditioning]:
            return [apply_to_conditioning(entries, region, **options) for entries in self.positive(prompts)]

        strength, always = options.get("strength", 1.0), options.get("mode") == "always"
        return replace(
            self, name=f"{self.name} + region", positive=positive,
            slope=lambda states: _with_slope(self.slope(states), region, strength, always),
        )  # fmt: skip

    def sample(
        self, conditionings: Sequence[Conditioning], guidance: float = 4.0, steps: int = 20, seed: int = 0
    ) -> Tensor:
        """Latents [B, ...] from one seed, for conditionings that `positive` made."""
        guide = scheduled(conditionings, self.backbone.levels, self.guide(steps))
        first = [conditioning[0] for conditioning in conditionings]
        return sample(self.backbone, first, self.negative, guidance, steps, seed, guide)


def _with_slope(states: Tensor, region: Region, strength: float, always: bool) -> Tensor:
    """States [B, T, D] as the region steers them, but where a gate is wide open it still has its ramp's slope.

    The true gate is flat there: a gradient could not tell which way it closes (Athalye, Carlini & Wagner, ICML 2018).
    """
    blocks, total = {CROSS_ATTENTION: states}, states
    for part in region.parts:
        open_by = openness(blocks, part, always)
        if part.gates and not always:
            depth = worst_depth(blocks, part) / part.gates[CROSS_ATTENTION].ramp
            open_by = torch.where(open_by > 0, open_by.detach() + depth - depth.detach(), 0.0)
        counts = judged(states, part.constant.get(CROSS_ATTENTION))[..., None]
        total = total + strength * open_by[:, None, None] * counts * displacement(states, part.moves[CROSS_ATTENTION])
    return total


def plain_positive(backbone: DemoBackbone) -> Callable[[Sequence[str]], list[Conditioning]]:
    """Each prompt as the text encoder has it, and rebuilt where it says so."""
    return lambda prompts: [[entry] for entry in encode_rebuilt(backbone, prompts)]


def shown(words: Sequence[str]) -> str:
    """Phrases as one prompt."""
    return ", ".join(words)


def cross_attentions(unet: UNet) -> list[Attention]:
    """The UNet's cross-attention layers, in the order of its modules."""
    return [module.cross_attention for module in unet.modules() if isinstance(module, TextBlock)]


def with_unet(backbone: DemoBackbone, unet: UNet) -> DemoBackbone:
    """A backbone with another UNet; the given one, which others share, stays as it is."""
    return DemoBackbone(replace(backbone.model, unet=unet))
